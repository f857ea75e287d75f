"""``python -m bench experiments``: what the layers do to training, on real data, in minutes.

Every file here is an experiment: it trains or measures (`run`, whose result is JSON), and makes of that result a
figure, a table and three findings. A finding is a claim with the number of repetitions in which it held and one
sentence that is put together from what was measured, whichever way it came out.
"""

from bench.experiments import batch_size, contrast, learning_rates, padding, running_statistics, sharing, signals

EXPERIMENTS = {
    module.EXPERIMENT.key: module.EXPERIMENT
    for module in (learning_rates, batch_size, padding, contrast, running_statistics, sharing, signals)
}
