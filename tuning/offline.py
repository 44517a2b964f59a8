"""The earlier name of `offline_tpu`."""

from offline_tpu import Prediction as Prediction
from offline_tpu import predict as predict
