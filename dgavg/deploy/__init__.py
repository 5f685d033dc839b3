"""Using the result: a trained model from a run's folder, predictions of it, files for others."""

from dgavg.deploy.export import export
from dgavg.deploy.predict import Predicted, predict
from dgavg.deploy.saved import Saved, load_run

__all__ = ["Predicted", "Saved", "export", "load_run", "predict"]
