"""Caches of several windows after some text, with all of its tokens beside them, so that what a query sees can be spelled out."""

from dataclasses import dataclass

import torch
from decode_cases import quantized_pages

from dms_kernels.arguments import Keys
from dms_kernels.quantization import dequantize

STALE = float("nan")


@dataclass
class WindowsCase:
    """float64. stored: a cache by the names of fields. text: of every token, stored or new, key and value [B, H, n, 2, D] (as stored) and class
    [B, H, n]; a row's `length` first tokens are stored."""

    stored: dict
    new: dict
    text_kv: torch.Tensor
    text_class: torch.Tensor
    length: list[int]

    def cast(self, dtype: torch.dtype) -> "WindowsCase":
        def to(part: dict) -> dict:
            floats = {name for name, x in part.items() if isinstance(x, torch.Tensor) and x.dtype == torch.float64}
            return part | {name: part[name].to(dtype) for name in floats}

        return WindowsCase(to(self.stored), to(self.new), self.text_kv, self.text_class, self.length)

    def widened(self) -> "WindowsCase":
        """In float64, the numbers of `cast` as they are; quantised pages and their scales stay."""

        def to(part: dict) -> dict:
            tensors = {n: x for n, x in part.items() if isinstance(x, torch.Tensor) and n != "page_scales"}
            return part | {n: x.double() for n, x in tensors.items() if x.is_floating_point() and x.dtype.itemsize > 1}

        return WindowsCase(to(self.stored), to(self.new), self.text_kv, self.text_class, self.length)

    def by_loops(self, q: torch.Tensor, q_position: torch.Tensor, scale: float, softcap=None, sink_logits=None) -> torch.Tensor:
        """The rule: q [B, Hq, T, D] at q_position [B, T] -> [B, T, Hq, D]."""
        B, Hq, T, D = q.shape
        G, windows = Hq // self.text_class.shape[1], self.stored["windows"]
        out = torch.zeros(B, T, Hq, D, dtype=torch.float64)
        for b in range(B):
            for t in range(T):
                at = int(q_position[b, t])
                for head in range(Hq) if at >= 0 else ():
                    h = head // G
                    seen = [
                        s for s in range(at + 1) if (c := int(self.text_class[b, h, s])) == 0 or at - s <= windows[c - 1]
                    ]  # fmt: skip
                    k, v = self.text_kv[b, h, seen].double().unbind(1)
                    scores = k @ q[b, head, t].double() * scale
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sink_logits is not None:
                        scores = torch.cat([scores, sink_logits[head, None].double()])
                    out[b, t, head] = scores.softmax(0)[: len(seen)] @ v
        return out


def make_windows_case(
    seed=0, B=2, H=2, D=16, P=16, windows=(3, 20, 33), most=90, num_new=0, padding=0.2, grown=None, quantized=None, length=None
) -> WindowsCase:
    """Rows of 0 to `most` stored tokens, and num_new that are not stored, padding among them. grown: ring slots. quantized: dtype of pages."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def below(n, *shape):
        return torch.randint(0, n, shape, generator=generator)

    K, w = len(windows), windows[0]
    R = w + 1 if grown is None else min(grown, w + 1)
    length = (below(most + 1, B) if grown is None else below(R + 1, B)) if length is None else torch.as_tensor(length)
    total = int(length.max()) + num_new
    text_kv, text_class = normal(B, H, total, 2, D), below(K + 1, B, H, total)
    ring, state = torch.full((B, H, 2, R, D), STALE, dtype=torch.float64), below(3, B, H, R).to(torch.uint8)
    lists = []
    for b in range(B):
        n = int(length[b])
        for h in range(H):
            for s in range(max(0, n - w - 1), n):
                ring[b, h, :, s % (w + 1)] = text_kv[b, h, s]
                state[b, h, s % (w + 1)] = state_of_class(text_class[b, h, s])
            for c in range(K):
                left = [s for s in range(n - w - 1) if text_class[b, h, s] == (c + 1 if c else 0)]
                gone = sum(n - 1 - s > windows[c] for s in left) if c else 0
                # Some that nobody sees may still be there, in front of one who is seen.
                lists.append(left[gone - (int(below(P, 1)) % (gone + 1) if gone < len(left) else 0) :])
    num_pages = sum(-(-len(entries) // P) for entries in lists)
    pages = torch.full((num_pages + 3, 2, P, D), STALE, dtype=torch.float64)
    positions = below(10**6, num_pages + 3, P).int()
    numbers = torch.randperm(num_pages + 3, generator=generator)[:num_pages].tolist()
    # Behind its pages a table may hold anything.
    table = torch.full((B * H * K, max(-(-len(entries) // P) for entries in lists) + 1), 10**6, dtype=torch.int32)
    for number, entries in enumerate(lists):
        for place in range(-(-len(entries) // P)):
            table[number, place] = page = numbers.pop()
            here = entries[place * P : place * P + P]
            pages[page, :, : len(here)] = text_kv[number // (H * K), number // K % H, here].transpose(0, 1)
            positions[page, : len(here)] = torch.tensor(here, dtype=torch.int32)
    stored = {
        "ring_kv": ring, "ring_state": state, "seq_len": length.int(), "pages": pages, "positions": positions, "windows": windows,
        "page_table": table.view(B, H * K, -1), "num_kept": torch.tensor([len(entries) for entries in lists]).int().view(B, H * K),
    }  # fmt: skip
    if quantized is not None:
        stored["pages"], stored["page_scales"] = quantized_pages(pages, quantized, generator)
        for number, entries in enumerate(lists):
            for i, s in enumerate(entries):
                where = table[number, i // P], slice(None), i % P
                text_kv[number // (H * K), number // K % H, s] = dequantize(stored["pages"][where], stored["page_scales"][where], 0)
    new = {}
    if num_new:
        real = torch.rand(B, num_new, generator=generator) >= padding
        position = torch.where(real, length[:, None] + real.cumsum(1) - 1, -1).int()
        at = position.long().clamp(min=0)[:, None].expand(B, H, num_new)
        kv = text_kv.gather(2, at[..., None, None].expand(-1, -1, -1, 2, D))
        new = {"k": kv[..., 0, :].contiguous(), "v": kv[..., 1, :].contiguous(), "position": position}
        new["state"] = state_of_class(text_class.gather(2, at))
    return WindowsCase(stored, new, text_kv, text_class, length.tolist())


def state_of_class(number: torch.Tensor) -> torch.Tensor:
    """uint8"""
    return torch.where(number > 1, number + 1, number).to(torch.uint8)


def recent_of(case: WindowsCase) -> list[Keys]:
    """The ring, where there is one, and the new tokens."""
    new = Keys(case.new["k"], case.new["v"], case.new["position"], state=case.new["state"])
    if max(case.length) == 0:
        return [new]
    ring, size = case.stored["ring_kv"], case.stored["windows"][0] + 1
    end = case.stored["seq_len"][:, None] - 1
    position = (end - (end - torch.arange(ring.shape[3])) % size).clamp(min=-1).int()
    return [Keys(ring[:, :, 0], ring[:, :, 1], position, state=case.stored["ring_state"]), new]
