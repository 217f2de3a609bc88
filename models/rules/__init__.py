"""Learning rules: each is the backward pass of a neuron's whole time window.

A rule is called with the weighted input sums of a population and its neuron, and returns spikes that are differentiable
by the rule:

    csbp      cross-spike error backpropagation (reconstructed)      Zeng, Chen, Li, Chen 2024
    tssl      temporal spike sequence learning                       Zhang & Li 2020
    spike_bp  spike-based backpropagation with leak correction       Lee et al. 2020
    rate_bp   derivative of the rate-current curve (reconstructed)   Lan & Chen 2022
    mlf       multi-level firing on stbp                             Feng et al. 2022
    stbp      backpropagation through time with a surrogate          the baseline
"""

from spikeport.models.rules.csbp import CSBP
from spikeport.models.rules.mlf import MLF
from spikeport.models.rules.rate_bp import RateBP
from spikeport.models.rules.rule import Rule
from spikeport.models.rules.spike_bp import SpikeBP
from spikeport.models.rules.stbp import STBP
from spikeport.models.rules.tssl import TSSL

__all__ = ["CSBP", "MLF", "STBP", "TSSL", "RateBP", "Rule", "SpikeBP"]
