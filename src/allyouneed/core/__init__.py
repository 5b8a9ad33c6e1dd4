"""Configurations, seeds, devices, files, metrics, progress: what every room stands on. Knows nothing of models."""

from allyouneed.core.config import Config as Config
from allyouneed.core.config import Configured as Configured
from allyouneed.core.errors import InputError as InputError
