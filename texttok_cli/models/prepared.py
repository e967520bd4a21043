"""A DiT on one batch at the times of a sampling run: modulations and the text's keys and values are computed once.

Letters: B batch, N tokens, D width, K distinct conditions (classes, and the null one), T text tokens, M null tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from texttok_cli.models.condition import Condition

if TYPE_CHECKING:
    from texttok_cli.models.dit import DiT, DiTBlock

# Times x conditions whose modulations are held at once: all of a run in one matmul a block, unless it has many classes.
# A row of DiT-XL takes 0.39 MB in bf16, so that 0.8 GB are held at most (1.6 GB in fp32).
MODULATION_ROWS = 2048
# Tokens of a batch (guided ones twice) up to which a GPU may run a step faster than its kernels can be launched one by one.
REPLAYED_ROWS = 8192
# Without cuDNN's, which may refuse the stream of a recording.
RECORDABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_recording = threading.Lock()  # one at a time: each begins by waiting for the whole GPU, which fails while another is being made

KeysValues = tuple[Tensor, Tensor]  # (B, H, T, E) each


class PreparedDiT:
    """`dit` at fixed times (steps,) under fixed conditions: a function of the noisy latents and the number of the time.

    Cheapest when the times are asked for in order. `null` says whether the null condition will be asked for.
    """

    def __init__(self, dit: DiT, times: Tensor, class_ids: Tensor | None, cond: Condition | None, *, null: bool) -> None:
        self.dit, self.times = dit, times
        self.classes, ranks, null_rank = _distinct(dit, class_ids, cond, null=null)
        self.rows = 1 if self.classes is None else len(self.classes)  # K; a text model's modulations depend on the time only
        self.blocks = _Blocks(dit, ranks, null_rank, cond, null=null)
        self.first = -1
        self.modulations: list[Tensor] = []  # of the times from `first` on; none yet
        self.replayed: dict[bool, Replayed] = {}  # by `null`

    def __call__(self, x: Tensor, step: int, *, null: bool = False) -> Tensor:
        """Noisy latents (B, ...) at times[step] -> predictions as DiT.forward's; with `null` (2B, ...), the null condition's last."""
        predict: Callable[..., Tensor] = partial(self.blocks, null=null)
        if x.is_cuda and (1 + null) * len(x) * len(self.dit.positions) <= REPLAYED_ROWS:
            if null not in self.replayed:
                self.replayed[null] = Replayed(predict)
            predict = self.replayed[null]
        return predict(x, *self._modulations_at(step))

    def _modulations_at(self, step: int) -> list[Tensor]:
        """Of each block (K, 6D), and of the output (K, 2D), at one time."""
        count = max(1, MODULATION_ROWS // self.rows)
        first = step // count * count
        if first != self.first:
            times = self.times[first : first + count]
            ids = None if self.classes is None else self.classes.repeat(len(times))
            c = self.dit.modulator(times.repeat_interleave(self.rows), ids)  # (times*K, D)
            self.modulations = []  # given back before the next are made
            linears = [*(block.modulation for block in self.blocks.blocks), self.dit.final_modulation]
            self.modulations = [linear(c).unflatten(0, (-1, self.rows)) for linear in linears]  # (times, K, 6D)
            self.first = first
        return [table[step - first] for table in self.modulations]


class _Blocks:
    """The network without its modulations.

    It must hold no reference to the recordings (`Replayed`), which hold one to it. In a reference cycle a recording would be freed
    by the garbage collector at an arbitrary time, and if that is while another recording is being made, that one fails.
    """

    def __init__(self, dit: DiT, ranks: Tensor, null_rank: int, cond: Condition | None, *, null: bool) -> None:
        self.dit, self.ranks, self.null_rank = dit, ranks, null_rank  # which of the K conditions each sample has (B,), and the null one's
        self.blocks = cast("Sequence[DiTBlock]", dit.blocks)
        self.text, self.text_mask, self.null_text = self._keys_values(cond, null=null)

    def __call__(self, x: Tensor, *tables: Tensor, null: bool) -> Tensor:
        """`PreparedDiT.__call__` with the modulations of the K conditions, (K, 6D) for each block and (K, 2D) for the output."""
        ranks = torch.cat([self.ranks, torch.full_like(self.ranks, self.null_rank)]) if null else self.ranks
        *modulations, final = (table[ranks][:, None] for table in tables)  # (B or 2B, 1, 6D) each
        h = self.dit.tokens(torch.cat([x, x]) if null else x)
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            h = block.run(h, modulation, self._reader(i) if self.text else None)
        return self.dit.output(h, final)

    def _keys_values(self, cond: Condition | None, *, null: bool) -> tuple[list[KeysValues], Tensor | None, list[KeysValues]]:
        """Of the text in each block, the text's mask (B, T), and of the null tokens (1, H, M, E) in each block."""
        if cond is None:
            return [], None, []
        assert self.dit.project is not None and self.dit.null_tokens is not None
        text = self.dit.project(cond)
        layers = [block.cross for block in self.blocks if block.cross is not None]
        null_tokens = self.dit.null_tokens[None]
        null_text = [layer.keys_values(null_tokens) for layer in layers] if null else []
        return [layer.keys_values(text.tokens) for layer in layers], text.mask, null_text

    def _reader(self, i: int) -> Callable[[Tensor], Tensor]:
        """How normalised tokens read the text in block i: the first B rows their own, further ones the null tokens."""
        cross, batch = self.blocks[i].cross, len(self.ranks)
        assert cross is not None

        def read(q: Tensor) -> Tensor:
            y: Tensor = cross.read(q[:batch], *self.text[i], self.text_mask)
            if len(q) == batch:
                return y
            k, v = (t.expand(batch, -1, -1, -1) for t in self.null_text[i])
            return torch.cat([y, cross.read(q[batch:], k, v, None)])

        return read


class Replayed:
    """A function of tensors of unchanging shapes on a GPU: called the first time, then recorded as a CUDA graph and replayed.

    A small batch's step is hundreds of short kernels, which take longer to launch one by one than to run.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.warm = function, False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's value, of tensors shaped as at the first call."""
        if not self.warm:  # libraries allocate and choose at the first call, which a recording does not allow
            self.warm = True
            with sdpa_kernel(RECORDABLE):
                return self.function(*inputs)
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            graph, device = torch.cuda.CUDAGraph(), inputs[0].device
            # On the inputs' GPU, which need not be torch's current one. By default another thread that asks for GPU memory meanwhile,
            # or for pinned memory as a loader does, would fail and make this fail.
            recording = torch.cuda.graph(graph, stream=_recording_stream(device), capture_error_mode="thread_local")
            with _recording, torch.cuda.device(device), recording, sdpa_kernel(RECORDABLE):
                self.output = self.function(*self.inputs)
            self.graph = graph
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.output.clone()  # the next replay writes over it


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for all recordings on a GPU: cuBLAS keeps megabytes for every stream that it ever multiplied on, on some GPUs 32."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _distinct(dit: DiT, class_ids: Tensor | None, cond: Condition | None, *, null: bool) -> tuple[Tensor | None, Tensor, int]:
    """The distinct classes (K,), the null one last if asked for; each sample's place among them (B,); the null one's place."""
    if class_ids is None or dit.classes is None:
        assert cond is not None
        return None, torch.zeros(len(cond.tokens), dtype=torch.long, device=cond.tokens.device), 0
    classes, ranks = torch.unique(class_ids, return_inverse=True)
    if null:
        classes = torch.cat([classes, classes.new_tensor([dit.classes.num_embeddings - 1])])
    return classes, ranks, len(classes) - 1
