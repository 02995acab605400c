"""FlashAttention's window kernels, in plain PyTorch: what their callers are tested with where there is no GPU."""

from __future__ import annotations

import torch


class Plain:
    """A window kernel in plain PyTorch, with the interface of `window_kernels.FA2`. What kernels leave undefined is NaN."""

    name = "plain"

    @staticmethod
    def _each(q, k, packed, window):
        """Query rows, key rows and mask of each sequence, of tensors with a batch dimension in front."""
        if packed is None:
            for b in range(q.shape[0]):
                yield b, slice(0, q.shape[1]), slice(0, k.shape[1]), Plain._mask(q.shape[1], k.shape[1], window)
            return
        cu_q, cu_k = packed.cu_q.tolist(), packed.cu_k.tolist()
        assert cu_q[-1] == q.shape[1] and cu_k[-1] == k.shape[1]
        for a, z, c, e in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            assert z - a <= packed.max_q and e - c <= packed.max_k
            yield 0, slice(a, z), slice(c, e), Plain._mask(z - a, e - c, window)

    @staticmethod
    def _mask(m, n, window):
        distance = torch.arange(n) - torch.arange(n - m, n)[:, None]
        left, right = (n + m if side is None else side for side in window)
        return (distance >= -left) & (distance <= right)

    @staticmethod
    def _scores(q, k, mask, scale):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~mask, -torch.inf)

    @staticmethod
    def forward(q, k, v, packed, window, scale):
        out, lse = torch.full_like(q, torch.nan), torch.full_like(q[..., 0], torch.nan)
        whole = [t[None] if packed is not None else t for t in (q, k, v, out, lse)]
        for b, rows, keys, mask in Plain._each(*whole[:2], packed, window):
            if rows.start == rows.stop or keys.start == keys.stop:
                continue
            scores = Plain._scores(whole[0][b, rows], whole[1][b, keys], mask, scale)
            values = whole[2][b, keys].repeat_interleave(q.shape[-2] // k.shape[-2], 1)
            whole[3][b, rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            whole[4][b, rows] = scores.logsumexp(-1).T
        return out, lse.transpose(-1, -2).contiguous()

    @staticmethod
    def backward(q, k, v, given, packed, window, scale):
        grads = [torch.full_like(t, torch.nan) for t in (q, k, v)]
        lse, grad_lse = (None if t is None else t.transpose(-1, -2) for t in (given.lse, given.grad_lse))
        whole = [
            t if t is None or packed is None else t[None]
            for t in (given.grad_out, q, k, v, given.out, lse, grad_lse, *grads)
        ]
        groups, repeats = k.shape[-2], q.shape[-2] // k.shape[-2]
        for b, rows, keys, mask in Plain._each(*whole[1:3], packed, window):
            do, query, o, row_lse = (whole[i][b, rows] for i in (0, 1, 4, 5))
            key, value = whole[2][b, keys], whole[3][b, keys].repeat_interleave(repeats, 1)
            weights = (Plain._scores(query, key, mask, scale) - row_lse.T[..., None]).exp()
            delta = (do * o).sum(-1) - (0 if grad_lse is None else whole[6][b, rows])
            change = weights * (torch.einsum("qhd,khd->hqk", do, value) - delta.T[..., None]) * scale
            if keys.start < keys.stop:
                whole[7][b, rows] = torch.einsum("hqk,khd->qhd", change, key.repeat_interleave(repeats, 1))
            # keys of a sequence without queries get zeros
            grad_k, grad_v = (
                torch.einsum("hqk,qhd->khd", w, t).unflatten(1, (groups, repeats)).sum(2)
                for w, t in ((change, query), (weights, do))
            )
            whole[8][b, keys], whole[9][b, keys] = grad_k, grad_v
        return tuple(grads)
