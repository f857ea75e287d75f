"""``python -m bench report``: one page of recorded runs."""
