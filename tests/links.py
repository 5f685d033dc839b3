"""Settings under which every link that comes with dgavg acts within 12 toy steps."""

ACTING = {
    "basic": {},
    "ma": {},
    "sma": {"start": 2},
    "ema": {"decay": 0.9},
    "swa": {"start": 0.3},
    "posthocema": {"snapshots": 4},
    "swag": {"start": 0.3, "rank": 2, "samples": 2},
    "twa": {"start": 0, "samples": 3, "steps": 4},
    "swad": {"n_converge": 1, "n_tolerance": 2},
    "aswa": {},
    "lawa": {"k": 2},
    "irm": {"weight": 1000.0, "anneal": 0},
    "vrex": {"weight": 1000.0, "anneal": 0},
    "coral": {"weight": 1000.0},
    "mixup": {"alpha": 1.0},
    "sam": {"rho": 0.5},
}
SHADOWS = ("sma", "ema", "swa", "posthocema", "swag", "twa", "swad", "aswa", "lawa")
# The setting that switches a link off: training is then what it is without the link.
NEUTRAL = {
    "ma": {"feedback": False},
    "irm": {"weight": 0.0},
    "vrex": {"weight": 0.0},
    "coral": {"weight": 0.0},
    "sam": {"rho": 0.0},
}
