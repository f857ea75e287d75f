"""Prints the table of models when the tests are over."""

from zoo_table import TABLE, lines


def pytest_terminal_summary(terminalreporter):
    if TABLE:
        terminalreporter.section(
            "models: differences from the model unconverted, errors, and milliseconds of a training step"
        )
        for line in lines():
            terminalreporter.line(line)
