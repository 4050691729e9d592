import json, math, time, zlib, sys, os
from dataclasses import dataclass
from pathlib import Path
from random import Random
import torch
from torch.utils.data import Dataset, DataLoader
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dms.evaluation.corpus import StdlibText
from dms.evaluation.tasks import make_document, DEFAULT_MIX
from dms.evaluation.lexicon import WORDS, VALUES

def train_tokenizer(vocab_size):
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers, AddedToken
    from transformers import PreTrainedTokenizerFast
    from dms.evaluation.corpus import stdlib_files
    added = [f" ${w}" for w in WORDS] + [f" {v}" for v in VALUES] + ["#:", "#?", "#+", "#-"]
    specials = ["<|endoftext|>", "<|pad|>"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tr = trainers.BpeTrainer(vocab_size=vocab_size - len(added), special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator((p.read_text(encoding="utf-8", errors="replace") for p in stdlib_files(False)), tr)
    tok.add_tokens([AddedToken(t, normalized=False) for t in added])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=2048, clean_up_tokenization_spaces=False)

class Docs(Dataset):
    def __init__(self, tok, length, items, n, seed, aw, held=False, questions=None, unseen=False):
        self.__dict__.update(locals())
        self.text = StdlibText(held)
    def __len__(self): return self.n
    def __getitem__(self, i):
        rng = Random(f"{self.seed}:{self.length}:{i}")
        lo, hi = self.items
        style = self.questions or rng.choice(("anywhere", "end"))
        mix = None
        n = rng.randint(lo, hi)
        d = make_document(self.tok, self.text, length=self.length, rng=rng, num_items=n, mix=mix, questions=style, unseen_keys=self.unseen)
        w = torch.tensor([1.0, 0.3, self.aw])[torch.tensor(d.role)]
        return torch.tensor(d.input_ids), w, d.answers if self.held else 0

@torch.no_grad()
def evaluate(model, tok, length, items, n, amp, unseen=True):
    ds = Docs(tok, length, items, n, 7, 1.0, held=True, questions="end", unseen=unseen)
    hit = {}; quart = {}
    nll = nb = 0.0
    for i in range(n):
        x, w, ans = ds[i]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            lo = model(input_ids=x[None]).logits[0].float()
        ce = torch.nn.functional.cross_entropy(lo[:-1], x[1:], reduction="none")
        nll += ce[w[1:] == 1].sum().item(); nb += (w[1:] == 1).sum().item()
        pred = lo.argmax(-1)
        for a in ans:
            ok = bool((pred[a.start - 1:a.end - 1] == x[a.start:a.end]).all())
            hit.setdefault(a.task, []).append(ok)
            if a.task in ("single", "multi_key", "multi_value", "multi_query"):
                quart.setdefault(min(3, (a.start - a.evidence) * 4 // length), []).append(ok)
    m = lambda v: round(sum(v) / len(v), 3)
    return dict(ce=round(nll / nb, 4), tasks={k: m(v) for k, v in sorted(hit.items())}, quart={k: m(v) for k, v in sorted(quart.items())})

def main(out, stages, vocab=2048, hidden=128, mlp=384, layers=4, lr=3e-3, aw=4.0, threads=2, wd=0.05, warm=100, comp=True, init=0.02):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    out = Path(out); out.mkdir(parents=True, exist_ok=True)
    tok = train_tokenizer(vocab)
    tok.save_pretrained(out)
    print("vocab", len(tok), flush=True)
    cfg = LlamaConfig(vocab_size=len(tok), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32, intermediate_size=mlp, max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=True, initializer_range=init, bos_token_id=0, eos_token_id=0, pad_token_id=1, attn_implementation="sdpa", use_cache=False)
    model = LlamaForCausalLM(cfg)
    print("params", sum(p.numel() for p in model.parameters()), flush=True)
    decay = [p for p in model.parameters() if p.dim() > 1]; rest = [p for p in model.parameters() if p.dim() <= 1]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=wd), dict(params=rest, weight_decay=0.0)], lr=lr, betas=(0.9, 0.95), fused=True)
    total = sum(s[2] for s in stages)
    def loss_fn(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lo = model(input_ids=x).logits
        ce = torch.nn.functional.cross_entropy(lo[:, :-1].reshape(-1, lo.shape[-1]).float(), x[:, 1:].reshape(-1), reduction="none")
        ww = w[:, 1:].reshape(-1)
        return (ce * ww).sum() / ww.sum(), (ce * (ww == 1)).sum() / (ww == 1).sum(), (ce * (ww > 1)).sum() / (ww > 1).sum()
    step = 0; t0 = time.time(); toks = 0
    for length, batch, steps, items in stages:
        torch._dynamo.reset()
        f = torch.compile(loss_fn) if comp else loss_fn
        ds = Docs(tok, length, items, steps * batch, 1, aw)
        for x, w, _ in DataLoader(ds, batch_size=batch, num_workers=1):
            frac = step / total
            cur = lr * min(1, (step + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * frac)))
            for g in opt.param_groups: g["lr"] = cur
            l, c, a = f(x, w); l.backward()
            gn = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step(); opt.zero_grad(); step += 1; toks += x.numel()
            if step % 50 == 0:
                print(f"{step}/{total} T{length} loss {l.item():.3f} code {c.item():.3f} ans {a.item():.3f} gn {gn:.2f} {toks/1e6:.1f}M {time.time()-t0:.0f}s", flush=True)
            if step % 200 == 0 or step == total:
                torch.save(dict(model=model.state_dict(), opt=opt.state_dict(), step=step), out / "state.pt")
                model.eval(); print(evaluate(model, tok, length, (items[1], items[1]), 32, True), flush=True); print("seen", evaluate(model, tok, length, (items[1], items[1]), 16, True, False), flush=True); model.train()
    model.save_pretrained(out)

if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), **json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
