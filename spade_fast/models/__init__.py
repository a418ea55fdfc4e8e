# SPDX-License-Identifier: Apache-2.0
"""Networks of the SPADE system, with the parameter names of the authors' released checkpoints."""

from spade_fast.models.discriminator import MultiscaleDiscriminator
from spade_fast.models.encoder import ConvEncoder, reparameterize
from spade_fast.models.generator import SPADEGenerator
from spade_fast.models.init import INITS, count_parameters, init_weights
from spade_fast.models.norms import norm_g_options
from spade_fast.models.vgg import VGG19Features, VGGWeightsError, load_vgg19

__all__ = [
    "INITS",
    "ConvEncoder",
    "MultiscaleDiscriminator",
    "SPADEGenerator",
    "VGG19Features",
    "VGGWeightsError",
    "count_parameters",
    "init_weights",
    "load_vgg19",
    "norm_g_options",
    "reparameterize",
]
