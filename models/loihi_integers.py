"""One step of Loihi's current-based LIF neuron in integers: the semantics that every backend is held to.

    tz(x, k) = sign(x) * (|x| >> k)
    u = tz(u * (4096 - (du + ds_offset)), 12) + (a << 6)
    u = u - 2^24 if u > 2^23;  then u + 2^24 if u <= -2^23        one conditional wrap, no modulo
    v = tz(v * (4096 - dv), 12) + u + bias
    v = clip(v, -(2^23 - 1), 2^23 - 1)                            v saturates, u wraps
    s = v > (vth << 6);  then v = 0 where s (reset "zero") or v - (vth << 6) (reset "subtract")

Equal to Lava 0.10's bit-accurate LIF (ds_offset 1), overflow included. "subtract" exists in no Loihi register and in
no Lava process; it is for simulators only.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # importing torch takes seconds, and graphs need the constants alone
    import numpy as np
    import torch

DECAY_BITS = 12
DECAY_UNITY = 1 << DECAY_BITS
INPUT_SHIFT = 6
THRESHOLD_SHIFT = 6
STATE_LIMIT = 1 << 23
MAX_DECAY = DECAY_UNITY - 1
MAX_THRESHOLD = (1 << 17) - 1
BIAS_MANT_LIMIT = 1 << 12
MAX_BIAS_EXP = 7
MAX_WEIGHT_EXPONENT = 7
MIN_WEIGHT_BITS, MAX_WEIGHT_BITS = 2, 8
"""Widths of a weight that networks are quantised to; one of a single bit could only be zero or not."""

SignMode = Literal["mixed", "excitatory", "inhibitory"]


def sign_mode(weight: "np.ndarray") -> SignMode:
    """The synapse format that holds weights of these signs."""
    if not weight.size or weight.min() >= 0:
        return "excitatory"
    return "inhibitory" if weight.max() <= 0 else "mixed"


def weight_range(sign: SignMode, bits: int = MAX_WEIGHT_BITS) -> tuple[int, int, int]:
    """Lowest and highest weight of a synapse format and the step between its levels.

    The chip clears the low 8 - bits + mixed bits of a weight, so that fewer bits are wider steps in the same range:
    2^bits levels of both signs, -256..256 - step, or of one, 0..256 - step.
    """
    step = 1 << (MAX_WEIGHT_BITS - bits + (sign == "mixed"))
    top = 256 - step
    return {"mixed": -256, "excitatory": 0, "inhibitory": -top}[sign], 0 if sign == "inhibitory" else top, step


class IntegerState(NamedTuple):
    """Current u and membrane v, int64 tensors of one shape."""

    u: "torch.Tensor"
    v: "torch.Tensor"


def truncate_shift(x: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Shift right towards zero: sign(x) * (|x| >> bits)."""
    import torch

    return torch.sign(x) * (x.abs() >> bits)


def integrate(
    state: IntegerState,
    a: "torch.Tensor",
    *,
    du: "torch.Tensor",
    dv: "torch.Tensor",
    bias: "torch.Tensor",
    ds_offset: int = 1,
) -> IntegerState:
    """u and v as they meet the threshold: one step without spike and reset; arguments as for `integer_step`."""
    import torch

    u = truncate_shift(state.u * (DECAY_UNITY - (du + ds_offset)), DECAY_BITS) + (a << INPUT_SHIFT)
    wrapped = torch.where(u > STATE_LIMIT, u - 2 * STATE_LIMIT, u)
    u = torch.where(wrapped <= -STATE_LIMIT, u + 2 * STATE_LIMIT, wrapped)
    v = truncate_shift(state.v * (DECAY_UNITY - dv), DECAY_BITS) + u + bias
    return IntegerState(u, v.clamp(-(STATE_LIMIT - 1), STATE_LIMIT - 1))


def integer_step(
    state: IntegerState,
    a: "torch.Tensor",
    *,
    du: "torch.Tensor",
    dv: "torch.Tensor",
    vth: "torch.Tensor",
    bias: "torch.Tensor",
    ds_offset: int = 1,
    reset: str = "zero",
) -> tuple[IntegerState, "torch.Tensor"]:
    """Advance neurons by one step.

    Args:
        state: u and v before the step.
        a: summed synaptic input, int64, same shape as the state.
        du, dv, vth, bias: int64, broadcastable to the state; `bias` is bias_mant << bias_exp.

    Returns:
        The state after reset, and the spikes as bool.
    """
    import torch

    u, v = integrate(state, a, du=du, dv=dv, bias=bias, ds_offset=ds_offset)
    level = vth << THRESHOLD_SHIFT
    spikes = v > level
    v = torch.where(spikes, v - level if reset == "subtract" else torch.zeros_like(v), v)
    return IntegerState(u, v), spikes


def shift_bias(mant: "torch.Tensor", exponent: "torch.Tensor") -> "torch.Tensor":
    """bias_mant << bias_exp; a negative exponent shifts right (arithmetically, as Lava does)."""
    import torch

    return torch.where(exponent >= 0, mant << exponent.clamp(min=0), mant >> (-exponent).clamp(min=0))
