"""Reading what named modules put out, without touching the model; finding feature pyramids."""

from .calls import Call as Call
from .discovery import Pyramid as Pyramid
from .discovery import find_pyramids as find_pyramids
from .discovery import pyramid_maps as pyramid_maps
from .maps import explaining_stride as explaining_stride
from .maps import feature_maps as feature_maps
from .maps import infer_stride as infer_stride
from .maps import infer_strides as infer_strides
from .maps import level_shapes as level_shapes
from .maps import plain as plain
from .maps import tensors_in as tensors_in
from .maps import tokens_to_maps as tokens_to_maps
from .modules import class_names as class_names
from .modules import evaluating as evaluating
from .modules import exported_in_train_mode as exported_in_train_mode
from .modules import frozen as frozen
from .modules import input_channels as input_channels
from .modules import is_average as is_average
from .modules import keeping_statistics as keeping_statistics
from .modules import resolve as resolve
from .modules import set_mode as set_mode
from .modules import sharded_modules as sharded_modules
from .modules import unwrap as unwrap
from .tap import FeatureTap as FeatureTap
from .tap import quiet as quiet
