"""Convolutions of spikes on the CPU whose work is proportional to the spikes.

Most values that a population sends are zero. A convolution here lists those that are not, and adds to its sums one row
of weights (or, for the gradient of the weights, of errors) for each of them. One loop does all of it, `_add_rows`: it
holds a few vectors of sums in registers while it goes through a list. The gradient of the input is not sparse and is
left to torch; so are dense layers, where the lists cost what they save.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import nn
from torch.autograd.function import once_differentiable

from spikeport.models.rules.window_loops import jit
from spikeport.models.threads import in_spans

LANES = 16
"""Numbers of a vector; where the processor's are shorter, each becomes several."""

MOST_VECTORS = 10
"""Vectors that a sum of rows holds in registers, of which there are 32 with AVX-512 (two sets up to five vectors)."""

DTYPES = (torch.float32, torch.float64)

DENSEST, DENSEST_GRADIENT = 0.4, 0.3
"""Shares of values that are not zero up to which a convolution, and the gradient of its weights, are faster than
torch's (float32, one thread with AVX-512; bench/spike_convolution.py)."""

FEWEST_CHANNELS = 8
"""A pixel with fewer has too few values to list."""

LEAST_WORK = 2**23
"""Multiplications of torch's convolution from which it is worth looking at the input."""

COUNTED_VALUES = 2**16

SLACK = 4
"""Entries behind the end of a list that may be read or written."""


@dataclass(frozen=True)
class Geometry:
    """Where the kernel of a convolution lies, down and right."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def convolve_layer(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """layer(x) by `convolve`, or by the layer itself where it has hooks or no such geometry."""
    geometry = geometry_of(layer)
    if geometry is None or layer._forward_hooks:
        out: torch.Tensor = layer(x)
        return out
    return convolve(x, layer.weight, geometry, layer.bias)


def geometry_of(layer: nn.Conv2d) -> Geometry | None:
    """None where a layer pads otherwise than by so many zeros."""
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return None
    stride, padding, dilation = ((pair[0], pair[1]) for pair in (layer.stride, layer.padding, layer.dilation))
    return Geometry(stride, padding, dilation, layer.groups)


def convolve(
    x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The convolution of x (n, channels, height, width); by work proportional to the values that are not zero, where
    they are few and the convolution is one that is handled here."""
    if not handles(x, weight, geometry) or (density := _density(x.detach())) > DENSEST:
        return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    out: torch.Tensor = _Convolution.apply(x, weight, geometry.padding, density <= DENSEST_GRADIENT)
    return out if bias is None else out + bias[:, None, None]


def handles(x: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> bool:
    """True where a convolution can be run here, and is large enough that it is worth counting spikes."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or torch.is_autocast_enabled("cpu"):
        return False
    plain = geometry == Geometry(padding=geometry.padding)
    fits = weight.shape[3] <= MOST_VECTORS and weight.shape[1] >= FEWEST_CHANNELS
    work = weight.numel() * x.numel() // weight.shape[1]
    return plain and fits and weight.dtype == x.dtype and work >= LEAST_WORK


def _density(x: torch.Tensor) -> float:
    """The share of values that are not zero, of some of the samples."""
    every = max(1, x.numel() // COUNTED_VALUES)
    some = x[::every].permute(0, 2, 3, 1)
    return _count(some.flatten(1).numpy()) / max(1, some.numel())


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int], sparse_gradient: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.sparse_gradient = padding, sparse_gradient
        outputs, channels, down, right = weight.shape
        lanes = LANES * _vectors(outputs)
        taps = weight.detach().permute(0, 2, 3, 1).reshape(outputs, down * right * channels)
        table = _blocks(taps, lanes).view(-1, down, right * channels, lanes)
        height, width = (x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i] + 1 for i in range(2))
        out = x.new_empty((x.shape[0], height, width, outputs))
        arrays = _pixels(x), table.numpy(), padding, right, out.numpy()

        def work(start: int, stop: int) -> None:
            _convolve(*arrays, start, stop)

        in_spans(work, x.shape[0], 1)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        found: list[torch.Tensor | None] = [None, None]
        dense = [of_x, of_weight and not ctx.sparse_gradient, False]
        if any(dense):
            ones = [1, 1]
            found[:] = torch.ops.aten.convolution_backward(
                gradients[0], x, weight, None, ones, ctx.padding, ones, False, [0, 0], 1, dense
            )[:2]
        if of_weight and ctx.sparse_gradient:
            found[1] = _weight_gradient(x, gradients[0], weight, ctx.padding)
        return found[0], found[1], None, None


def _weight_gradient(
    x: torch.Tensor, errors: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]
) -> torch.Tensor:
    """Of a convolution; each thread adds up its share of the samples, and the sums of all are added in order."""
    outputs, channels, down, right = weight.shape
    samples = x.shape[0]
    vectors = _vectors(outputs, right)
    blocks = -(-outputs // (LANES * vectors))
    parts = max(1, min(torch.get_num_threads(), samples))
    share = -(-samples // parts)
    sums = x.new_zeros((parts, blocks, channels, down, right, LANES * vectors))
    pixels, error_pixels, totals = _pixels(x), _pixels(errors), sums.numpy()

    def work(start: int, stop: int) -> None:
        for part in range(start, stop):
            first, last = part * share, min(samples, (part + 1) * share)
            _convolve_errors(pixels, error_pixels, padding, totals[part], first, last)

    in_spans(work, parts, 1)
    total = sums.sum(dim=0) if parts > 1 else sums[0]
    of_weight = total.permute(0, 4, 1, 2, 3).flatten(0, 1)[:outputs].flip(3)
    return torch.empty_like(weight).copy_(of_weight)


def _vectors(outputs: int, columns: int = 1) -> int:
    """Vectors of a block of outputs, so that the registers hold sums for `columns` times as many: as few loads as
    possible, of which each entry of a list takes two on top of one per vector."""
    needed = -(-outputs // LANES)
    return min(range(1, MOST_VECTORS // columns + 1), key=lambda each: -(-needed // each) * (each * columns + 2))


def _blocks(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """Weights (outputs, features) as (blocks, features, lanes), with zeros for outputs that there are not."""
    outputs, features = weight.shape
    padded = nn.functional.pad(weight, (0, 0, 0, -outputs % lanes))
    return padded.view(-1, lanes, features).transpose(1, 2).contiguous()


def _pixels(x: torch.Tensor) -> np.ndarray:
    """x (n, channels, height, width) as (n, height, width, channels), copied only where it lies otherwise."""
    array: np.ndarray = x.detach().permute(0, 2, 3, 1).contiguous().numpy()
    return array


_written_out: Any = intrinsic  # its type says that the first parameter is given by the caller


@_written_out
def _add_rows(typingctx, vectors, values, rows, first, last, table, offset, stride, sums, at):  # type: ignore[no-untyped-def]
    """sums[at + i] += sum over e in first..last of values[e] table[offset + stride rows[e] + i], i < LANES vectors.

    Numba would keep the sums in memory; written out, they stay in registers. Short sums are added up in several sets,
    because an addition takes a few cycles until the next can follow.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        count, _, _, first, last, _, offset, stride, _, at = args
        data = {
            name: context.make_array(signature.args[place])(context, builder, args[place]).data
            for name, place in (("values", 1), ("rows", 2), ("table", 5), ("sums", 8))
        }
        number = context.get_data_type(signature.args[5].dtype)
        word, vector = ir.IntType(64), ir.VectorType(number, LANES)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        size = number.get_abi_size(context.target_data)
        no_value, first_place = ir.Constant(number, 0.0), ir.Constant(word, 0)

        def pointer(base, index):  # type: ignore[no-untyped-def]
            return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())

        def plus(index, number):  # type: ignore[no-untyped-def]
            return builder.add(index, ir.Constant(word, number))

        def added(entry, sums, inside=None):  # type: ignore[no-untyped-def]
            value = builder.load(builder.gep(data["values"], [entry]))
            row = builder.sext(builder.load(builder.gep(data["rows"], [entry])), word)
            start = builder.add(builder.mul(row, stride), offset)
            if inside is not None:
                value, start = builder.select(inside, value, no_value), builder.select(inside, start, first_place)
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            spread = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)
            found = []
            for i, total in enumerate(sums):
                weights = builder.load(pointer(data["table"], plus(start, i * LANES)), align=size)
                product = builder.fmul(spread, weights, flags=("contract",))
                found.append(builder.fadd(product, total, flags=("contract",)))
            return found

        def loop(step, sets):  # type: ignore[no-untyped-def]
            """Entries in steps of `step` as long as a whole one is left; where that ended, and the sums."""
            before = builder.block
            head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
            builder.branch(head)
            builder.position_at_end(head)
            entry = builder.phi(word)
            entry.add_incoming(first, before)
            totals = []
            for each in sets:
                totals.append([builder.phi(vector) for _ in each])
                for phi, value in zip(totals[-1], each, strict=True):
                    phi.add_incoming(value, before)
            builder.cbranch(builder.icmp_signed("<=", plus(entry, step), last), body, end)
            builder.position_at_end(body)
            found = [added(plus(entry, k), totals[k]) for k in range(step)]
            after = plus(entry, step)
            builder.branch(head)
            entry.add_incoming(after, builder.block)
            for phis, values in zip(totals, found, strict=True):
                for phi, value in zip(phis, values, strict=True):
                    phi.add_incoming(value, builder.block)
            builder.position_at_end(end)
            return entry, totals

        done = builder.append_basic_block("done")
        switch = builder.switch(count, done)
        for vectors in range(1, MOST_VECTORS + 1):
            case = builder.append_basic_block(f"vectors{vectors}")
            switch.add_case(ir.Constant(count.type, vectors), case)
            builder.position_at_end(case)
            places = [pointer(data["sums"], plus(at, i * LANES)) for i in range(vectors)]
            sets = 4 if vectors <= 2 else 2 if vectors <= 5 else 1
            kept = [builder.load(place, align=size) for place in places]
            zeros = [ir.Constant(vector, [0.0] * LANES)] * vectors
            entry, totals = loop(sets, [kept] + [zeros] * (sets - 1))
            # the entries left over, without a branch that would be guessed wrong half the time
            for k in range(sets - 1):
                rest = plus(entry, k)
                totals[k] = added(rest, totals[k], builder.icmp_signed("<", rest, last))
            while len(totals) > 1:
                half = len(totals) // 2
                totals = [
                    [builder.fadd(a, b) for a, b in zip(totals[k], totals[k + half], strict=True)] for k in range(half)
                ]
            for place, total in zip(places, totals[0], strict=True):
                builder.store(total, place, align=size)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    integer = types.int64
    signature = types.void(integer, values, rows, integer, integer, table, integer, integer, sums, integer)
    return signature, codegen


@_written_out
def _compress(typingctx, x, start, count, row, values, rows, at):  # type: ignore[no-untyped-def]
    """List those of x[start : start + count] that are not zero in values[at:], and their places, counted from `row`, in
    rows[at:]; where the list ends. Up to one place behind that end may be written.

    AVX-512 has an instruction that packs a vector; elsewhere each number is written, and kept if it is not zero.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, start, count, first_row, _, _, at = args
        x, values, rows = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 4, 5))
        number, word, index = x.type.pointee, ir.IntType(64), ir.IntType(32)
        lanes = LANES if get_host_cpu_features().get("avx512f") else 1
        before = builder.block
        head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        done, found = builder.phi(word), builder.phi(word)
        done.add_incoming(ir.Constant(word, 0), before)
        found.add_incoming(at, before)
        builder.cbranch(builder.icmp_signed("<", done, count), body, end)
        builder.position_at_end(body)
        source = builder.gep(x, [builder.add(start, done)])
        value_to, row_to = builder.gep(values, [found]), builder.gep(rows, [found])
        place = builder.trunc(builder.add(first_row, done), index)
        if lanes == 1:
            value = builder.load(source)
            builder.store(value, value_to)
            builder.store(place, row_to)
            kept = builder.zext(builder.fcmp_unordered("!=", value, ir.Constant(number, 0.0)), word)
        else:
            numbers, places = ir.VectorType(number, lanes), ir.VectorType(index, lanes)
            iota = ir.Constant(places, list(range(lanes)))

            def spread(value):  # type: ignore[no-untyped-def]
                one = builder.insert_element(ir.Constant(places, ir.Undefined), value, ir.Constant(index, 0))
                return builder.shuffle_vector(one, ir.Constant(places, ir.Undefined), ir.Constant(places, [0] * lanes))

            def call(name, result, *arguments):  # type: ignore[no-untyped-def]
                kind = ir.FunctionType(result, [each.type for each in arguments])
                return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)

            bytes_each = number.get_abi_size(context.target_data)
            width = 8 * bytes_each
            left = builder.trunc(builder.sub(count, done), index)
            inside = builder.icmp_signed("<", iota, spread(left))
            source = builder.bitcast(source, numbers.as_pointer())
            zeros = ir.Constant(numbers, [0.0] * lanes)
            align = ir.Constant(index, bytes_each)
            value = call(f"llvm.masked.load.v{lanes}f{width}.p0", numbers, source, align, inside, zeros)
            chosen = builder.fcmp_unordered("!=", value, zeros)
            places_found = builder.add(spread(place), iota)
            call(f"llvm.masked.compressstore.v{lanes}f{width}", ir.VoidType(), value, value_to, chosen)
            call(f"llvm.masked.compressstore.v{lanes}i32", ir.VoidType(), places_found, row_to, chosen)
            kept = builder.zext(builder.ctpop(builder.bitcast(chosen, ir.IntType(lanes))), word)
        after = builder.add(done, ir.Constant(word, lanes))
        done.add_incoming(after, builder.block)
        found.add_incoming(builder.add(found, kept), builder.block)
        builder.branch(head)
        builder.position_at_end(end)
        return found

    integer = types.int64
    return integer(x, integer, integer, integer, values, rows, integer), codegen


@jit
def _count(x):  # type: ignore[no-untyped-def]
    found = 0
    for n in range(x.shape[0]):
        for i in range(x.shape[1]):
            found += x[n, i] != 0
    return found


@jit
def _aligned(size, x):  # type: ignore[no-untyped-def]
    """Zeros of x's type that begin at a cache line: a vector across two lines takes two loads."""
    found = np.zeros(size + LANES, x.dtype)
    start = (-found.ctypes.data % 64) // found.itemsize
    return found[start : start + size]


@jit
def _convolve(x, weights, padding, columns, out, start, stop):  # type: ignore[no-untyped-def]
    """out (n, height, width, channels) of samples start..stop; weights (blocks, rows of the kernel, `columns` of it
    times channels of x, lanes)."""
    _, height, width, channels = x.shape
    out_height, out_width, out_channels = out.shape[1:]
    blocks, lines, table_rows, lanes = weights.shape
    table = weights.reshape(weights.size)
    down, right = padding
    values = np.empty(height * width * channels + SLACK, x.dtype)
    rows = np.empty(values.size, np.int32)
    starts = np.empty((height, width + 1), np.int64)
    sums = _aligned(out_height * out_width * lanes, x)
    for n in range(start, stop):
        image = x[n].reshape(height * width * channels)
        found = 0
        for row in range(height):
            for column in range(width):
                starts[row, column] = found
                pixel = column * channels
                found = _compress(image, row * width * channels + pixel, channels, pixel, values, rows, found)
            starts[row, width] = found
        for block in range(blocks):
            sums[:] = 0
            for line in range(lines):
                begin = (block * lines + line) * table_rows * lanes
                for out_row in range(max(0, down - line), min(out_height, height + down - line)):
                    row = out_row - down + line
                    for out_column in range(out_width):
                        left = out_column - right
                        first = starts[row, max(0, min(width, left))]
                        last = starts[row, max(0, min(width, left + columns))]
                        offset = begin - left * channels * lanes
                        at = (out_row * out_width + out_column) * lanes
                        _add_rows(lanes // LANES, values, rows, first, last, table, offset, lanes, sums, at)
            _unpack(sums, lanes, block * lanes, out[n].reshape(out_height * out_width, out_channels))


@jit
def _unpack(sums, lanes, channel, out):  # type: ignore[no-untyped-def]
    """Sums of a block of channels into out (n, channels)."""
    count = min(lanes, out.shape[1] - channel)
    for n in range(out.shape[0]):
        _copy(sums[n * lanes :], out[n, channel:], count)


@jit
def _copy(source, target, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        target[i] = source[i]


@jit
def _convolve_errors(x, errors, padding, sums, start, stop):  # type: ignore[no-untyped-def]
    """Add the gradient of the weights from samples start..stop to sums (blocks, channels of x, rows of the kernel, its
    columns from the last to the first, lanes)."""
    _, height, width, channels = x.shape
    out_height, out_width, out_channels = errors.shape[1:]
    blocks, _, lines, columns, lanes = sums.shape
    totals = sums.reshape(sums.size)
    tall, wide = height + lines - 1, width + columns - 1
    above, before = lines - 1 - padding[0], columns - 1 - padding[1]
    table = _aligned(blocks * tall * wide * lanes, x)
    packed = table.reshape((blocks, tall, wide, lanes))
    pixels = height * width
    turned = np.empty(channels * pixels, x.dtype)
    values = np.empty(channels * pixels + SLACK, x.dtype)
    rows = np.empty(values.size, np.int32)
    starts = np.empty(channels + 1, np.int64)
    for n in range(start, stop):
        for row in range(max(0, -above), min(out_height, tall - above)):
            for column in range(max(0, -before), min(out_width, wide - before)):
                for block in range(blocks):
                    channel = block * lanes
                    count = min(lanes, out_channels - channel)
                    _copy(errors[n, row, column, channel:], packed[block, row + above, column + before], count)
        image = x[n].reshape(pixels, channels)
        for pixel in range(pixels):
            for c in range(channels):
                turned[c * pixels + pixel] = image[pixel, c]
        found = 0
        for c in range(channels):
            starts[c] = found
            for row in range(height):
                found = _compress(turned, c * pixels + row * width, width, row * wide, values, rows, found)
        starts[channels] = found
        for block in range(blocks):
            for c in range(channels):
                for line in range(lines):
                    offset = (block * tall + lines - 1 - line) * wide * lanes
                    at = ((block * channels + c) * lines + line) * columns * lanes
                    vectors = columns * lanes // LANES
                    _add_rows(vectors, values, rows, starts[c], starts[c + 1], table, offset, lanes, totals, at)
