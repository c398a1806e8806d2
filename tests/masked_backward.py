"""Backward passes with masked weights written out in NumPy: slow, obvious, the specification.

Everything is float64 and channels-last. ``masks`` are 1 where a weight is kept on the way back.
"""

import numpy as np


def mlp_gradients(params, masks, x):
    """Return loss and gradients of ``mean((tanh(tanh(x A + a) B + b) C) ** 2)``."""
    h1 = np.tanh(x @ params["A"] + params["a"])
    h2 = np.tanh(h1 @ params["B"] + params["b"])
    y = h2 @ params["C"]
    grads = {}
    dy = 2 * y / y.size
    grads["C"] = h2.T @ dy
    dh2 = dy @ (params["C"] * masks["C"]).T
    dz2 = dh2 * (1 - h2**2)
    grads["B"], grads["b"] = h1.T @ dz2, dz2.sum(0)
    dh1 = dz2 @ (params["B"] * masks["B"]).T
    dz1 = dh1 * (1 - h1**2)
    grads["A"], grads["a"] = x.T @ dz1, dz1.sum(0)
    return np.mean(y**2), grads


def taps(x, kernel, stride, dilation, groups):
    """Yield the slices of input, kernel and output that one tap of a VALID convolution joins.

    ``x`` is (batch, height, width, channels), ``kernel`` (height, width, channels / groups, features).
    """
    kh, kw, per_group, features = kernel.shape
    rows, columns = output_size(x, kernel, stride, dilation)
    for group in range(groups):
        ins = slice(group * per_group, (group + 1) * per_group)
        outs = slice(group * features // groups, (group + 1) * features // groups)
        for i in range(rows):
            for j in range(columns):
                for u in range(kh):
                    for v in range(kw):
                        pixel = (slice(None), i * stride + u * dilation, j * stride + v * dilation, ins)
                        yield pixel, (u, v, slice(None), outs), (slice(None), i, j, outs)


def output_size(x, kernel, stride, dilation):
    reach = [(k - 1) * dilation + 1 for k in kernel.shape[:2]]
    return [(n - r) // stride + 1 for n, r in zip(x.shape[1:3], reach)]


def conv(x, kernel, **layout):
    size = output_size(x, kernel, layout["stride"], layout["dilation"])
    y = np.zeros((len(x), *size, kernel.shape[-1]))
    for pixel, tap, out in taps(x, kernel, **layout):
        y[out] += x[pixel] @ kernel[tap]
    return y


def conv_backward(x, kernel, mask, dy, **layout):
    """Return the masked gradient for ``x`` and the exact one for ``kernel``."""
    dx, dkernel = np.zeros(x.shape), np.zeros(kernel.shape)
    for pixel, tap, out in taps(x, kernel, **layout):
        dx[pixel] += dy[out] @ (kernel * mask)[tap].T
        dkernel[tap] += x[pixel].T @ dy[out]
    return dx, dkernel


def cnn_gradients(params, masks, x, layouts):
    """Return loss and gradients of convolutions with tanh, a mean over the pixels and a dense layer.

    ``params`` are ``"0"``, ``"1"``, ... (kernels) and ``"head"``; ``layouts`` gives ``stride``,
    ``dilation`` and ``groups`` of each.
    """
    inputs = [x]
    for i, layout in enumerate(layouts):
        inputs.append(np.tanh(conv(inputs[-1], params[str(i)], **layout)))
    pooled = inputs[-1].mean((1, 2))
    y = pooled @ params["head"]
    dy = 2 * y / y.size
    grads = {"head": pooled.T @ dy}
    dpooled = dy @ (params["head"] * masks["head"]).T
    dh = np.broadcast_to(dpooled[:, None, None] / np.prod(inputs[-1].shape[1:3]), inputs[-1].shape)
    for i in reversed(range(len(layouts))):
        dz = dh * (1 - inputs[i + 1] ** 2)
        dh, grads[str(i)] = conv_backward(inputs[i], params[str(i)], masks[str(i)], dz, **layouts[i])
    return np.mean(y**2), grads
