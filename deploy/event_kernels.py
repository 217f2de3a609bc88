"""Compiled kernels of the event simulator (Numba): spikes in, synaptic sums out, neurons advanced by one step.

Arrays are over a chunk of samples. Images are kept channels-last inside, so that the targets of one kernel position lie
side by side. A spike list is (indices, payloads, counts): row b holds counts[b] events of sample b. Every kernel that
accumulates returns the synaptic operations it did, counted where they are done.
"""

import numba
import numpy as np

DECAY_UNITY = 4096
DECAY_BITS = 12
SHIFT = 6
LIMIT = 1 << 23

jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@jit
def collect(values, indices, payloads, counts):  # type: ignore[no-untyped-def]
    """Turn dense input values (samples, n) into a spike list."""
    for b in range(values.shape[0]):
        count = 0
        for i in range(values.shape[1]):
            if values[b, i] != 0:
                indices[b, count] = i
                payloads[b, count] = values[b, i]
                count += 1
        counts[b] = count


@jit
def accumulate_rows(indices, payloads, counts, first_cell, cells, weight, acc, operations):  # type: ignore[no-untyped-def]
    """Dense: every cell that a source counts into adds its row of weights to all targets."""
    n_out = weight.shape[1]
    for b in range(counts.shape[0]):
        done = 0
        for k in range(counts[b]):
            source = indices[b, k]
            payload = payloads[b, k]
            for c in range(first_cell[source], first_cell[source + 1]):
                row = cells[c]
                if payload == 1:
                    for j in range(n_out):
                        acc[b, j] += weight[row, j]
                else:
                    for j in range(n_out):
                        acc[b, j] += weight[row, j] * payload
                done += n_out
        operations[b] = done


@jit
def accumulate_lists(indices, payloads, counts, first, targets, weights, acc, operations):  # type: ignore[no-untyped-def]
    """Sparse and one-to-one: each source has its list of targets and weights."""
    for b in range(counts.shape[0]):
        done = 0
        for k in range(counts[b]):
            source = indices[b, k]
            for s in range(first[source], first[source + 1]):
                acc[b, targets[s]] += weights[s] * payloads[b, k]
            done += first[source + 1] - first[source]
        operations[b] = done


@jit
def accumulate_conv(indices, payloads, counts, geometry, weight, acc, operations):  # type: ignore[no-untyped-def]
    """Convolution, pooled addressing included. weight: (in channels, height, width, out channels / groups).

    geometry: in channels, in height, in width, pool height, pool width, pool stride down, right, pooled height, width,
    stride down, right, padding top, left, dilation down, right, out channels, out height, out width, groups.
    """
    channels, width_in = geometry[0], geometry[2]
    pool_h, pool_w, pool_down, pool_right, pooled_h, pooled_w = geometry[3:9]
    down, right, top, left, gap_down, gap_right = geometry[9:15]
    channels_out, height_out, width_out, groups = geometry[15:19]
    kernel_h, kernel_w, group_out = weight.shape[1], weight.shape[2], weight.shape[3]
    group_in = channels // groups
    for b in range(counts.shape[0]):
        done = 0
        for k in range(counts[b]):
            source = indices[b, k]
            payload = payloads[b, k]
            channel = source % channels
            place = source // channels
            y, x = place // width_in, place % width_in
            offset = (channel // group_in) * group_out
            first_row = max(0, (y - pool_h + pool_down) // pool_down)
            last_row = min(pooled_h - 1, y // pool_down)
            first_column = max(0, (x - pool_w + pool_right) // pool_right)
            last_column = min(pooled_w - 1, x // pool_right)
            for py in range(first_row, last_row + 1):
                for px in range(first_column, last_column + 1):
                    for ky in range(kernel_h):
                        oy = py + top - ky * gap_down
                        if oy < 0 or oy % down != 0 or oy // down >= height_out:
                            continue
                        for kx in range(kernel_w):
                            ox = px + left - kx * gap_right
                            if ox < 0 or ox % right != 0 or ox // right >= width_out:
                                continue
                            base = ((oy // down) * width_out + ox // right) * channels_out + offset
                            if payload == 1:
                                for o in range(group_out):
                                    acc[b, base + o] += weight[channel, ky, kx, o]
                            else:
                                for o in range(group_out):
                                    acc[b, base + o] += weight[channel, ky, kx, o] * payload
                            done += group_out
        operations[b] = done


@jit
def shift_into(part, places, acc):  # type: ignore[no-untyped-def]
    """Add `part >> places` (arithmetic shift) to acc and clear part: a projection with a negative exponent."""
    for b in range(acc.shape[0]):
        for i in range(acc.shape[1]):
            acc[b, i] += part[b, i] >> places
            part[b, i] = 0


@jit
def integrate(  # type: ignore[no-untyped-def]
    acc, u, v, keep_u, keep_v, level, bias, subtract, external, indices, payloads, counts, bits, active
):
    """One step of every neuron (`spikeport.models.loihi_integers`), which also clears acc.

    keep_u = 4096 - du - ds_offset, keep_v = 4096 - dv, level = vth << 6; each of shape (1,) or (n,). external: index of
    each neuron in the trace. bits (spikes), active: (samples, ceil(n / 8)), zero on entry.
    """
    u_one, v_one, level_one, bias_one = keep_u.size == 1, keep_v.size == 1, level.size == 1, bias.size == 1
    for b in range(acc.shape[0]):
        count = 0
        for i in range(acc.shape[1]):
            a = np.int64(acc[b, i])
            old_u = np.int64(u[b, i])
            old_v = np.int64(v[b, i])
            offset = bias[0] if bias_one else bias[i]
            if a == 0 and old_u == 0 and old_v == 0 and offset == 0:
                # at rest without input: 0 > vth << 6 never holds, as vth is unsigned
                continue
            place = external[i]
            active[b, place >> 3] |= np.uint8(128 >> (place & 7))
            acc[b, i] = 0
            product = old_u * (keep_u[0] if u_one else keep_u[i])
            new_u = (product >> DECAY_BITS if product >= 0 else -(-product >> DECAY_BITS)) + (a << SHIFT)
            if new_u > LIMIT:
                new_u -= 2 * LIMIT
            if new_u <= -LIMIT:
                new_u += 2 * LIMIT
            product = old_v * (keep_v[0] if v_one else keep_v[i])
            new_v = (product >> DECAY_BITS if product >= 0 else -(-product >> DECAY_BITS)) + new_u + offset
            new_v = min(max(new_v, -(LIMIT - 1)), LIMIT - 1)
            threshold = level[0] if level_one else level[i]
            if new_v > threshold:
                new_v = new_v - threshold if subtract else 0
                indices[b, count] = i
                payloads[b, count] = 1
                count += 1
                bits[b, place >> 3] |= np.uint8(128 >> (place & 7))
            u[b, i] = new_u
            v[b, i] = new_v
        counts[b] = count
