"""Naive oracles, written from the equations of arXiv 2604.14629 with loops in float64. They share no code with the package.

`ldpv2` follows MobileVLM V2 (arXiv 2402.03766, section 3.3)."""

import math

import torch
from torch import Tensor


def knee(row: Tensor, window: int | None = None) -> int:
    """Eqs. 8-9, one row."""
    z = sorted(row.double().tolist(), reverse=True)[:window]
    n, z_max, z_min = len(z), z[0], z[-1]
    if z_max == z_min:
        return 2
    best_i, best_d = 1, -math.inf
    for i in range(1, n + 1):
        y = (z[i - 1] - z_min) / (z_max - z_min)
        d = (1 - i / n) - y
        if d > best_d:
            best_i, best_d = i, d
    return max(best_i, 2)


def ranking(row: Tensor) -> list[int]:
    """Ids by descending logit; equal logits by ascending id."""
    values = row.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def difference_distribution(row: Tensor, ids: list[int], temperature: float) -> Tensor:
    """Eqs. 12-13: log of the softmax over the flattened upper triangle of differences, one row, [k (k - 1) / 2]."""
    z = row.double()[ids]
    first, second = torch.triu_indices(len(ids), len(ids), offset=1)
    return ((z[first] - z[second]) / temperature).log_softmax(0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q), nats."""
    return (log_p.exp() * (log_p - log_q)).sum()


def logits_difference(student: Tensor, teacher: Tensor, ids: list[int], temperature: float, divergence: str) -> Tensor:
    """One branch (eq. 14 or 15) for one position."""
    s = difference_distribution(student, ids, temperature)
    t = difference_distribution(teacher.detach(), ids, temperature)
    return kl(s, t) if divergence == "reverse_kl" else kl(t, s)


def dbild(student: Tensor, teacher: Tensor, temperature: float, divergence: str, window: int | None = None) -> Tensor:
    """Eq. 7 for every position, [T]."""
    out = []
    for s, t in zip(student, teacher, strict=True):
        led_t = ranking(t)[: knee(t, window)]
        led_s = ranking(s)[: knee(s, window)]
        out.append(sum(logits_difference(s, t, ids, temperature, divergence) for ids in (led_t, led_s)))
    return torch.stack(out) if out else student.sum(-1)


def bild(student: Tensor, teacher: Tensor, top_k: int, temperature: float, divergence: str) -> Tensor:
    """BiLD with a fixed k for every position, [T]."""
    out = []
    for s, t in zip(student, teacher, strict=True):
        branches = (ranking(t)[:top_k], ranking(s)[:top_k])
        out.append(sum(logits_difference(s, t, ids, temperature, divergence) for ids in branches))
    return torch.stack(out)


def ldpv2(features: Tensor, weights: dict[str, Tensor], grid: int) -> Tensor:
    """LDPv2 on one image, [n, d_v] → [grid², d]: two pointwise layers, average pooling, depthwise 3×3 with a residual."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    side = round(len(features) ** 0.5)
    tokens = []
    for feature in features.double():
        inner = w["linear_1.weight"] @ feature + w["linear_1.bias"]
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        tokens.append(w["linear_2.weight"] @ inner + w["linear_2.bias"])
    width = len(tokens[0])
    pooled = {}
    for i in range(grid):
        for j in range(grid):  # a cell averages every token that its part of the square touches
            rows = range(i * side // grid, -(-(i + 1) * side // grid))
            columns = range(j * side // grid, -(-(j + 1) * side // grid))
            cell = [tokens[r * side + c] for r in rows for c in columns]
            pooled[i, j] = sum(cell) / len(cell)
    out = []
    for i in range(grid):
        for j in range(grid):
            value = pooled[i, j] + w["position.bias"]
            for r in (-1, 0, 1):
                for c in (-1, 0, 1):
                    if (i + r, j + c) in pooled:
                        value = value + w["position.weight"][:, 0, r + 1, c + 1] * pooled[i + r, j + c]
            assert len(value) == width
            out.append(value)
    return torch.stack(out)


def vqa_consensus(prediction, people):
    """VQA accuracy by its definition: for every person left out, min(1, equal answers among the others / 3); their mean."""
    total = 0.0
    for left_out in range(len(people)):
        equal = 0
        for place, answer in enumerate(people):
            if place != left_out and answer == prediction:
                equal += 1
        total += min(1.0, equal / 3)
    return total / len(people)


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def vqa_server(submitted, people):
    """The score of a submitted answer by vqaEval.py: texts are changed only where people differ; then `vqa_consensus`."""

    def changed(text):
        out = ""
        for place, character in enumerate(text):
            if character == "." and not text[place + 1 : place + 2].isdigit():
                continue
            if character in ';/[]"{}()=+\\_-><@`,?!':
                # Of equal marks, one beside a space removes all; so does a number with a comma, for every mark.
                beside = character + " " in text or " " + character in text
                comma = any(
                    a.isdigit() and m == "," and b.isdigit() for a, m, b in zip(text, text[1:], text[2:], strict=False)
                )
                out += "" if beside or comma else " "
            else:
                out += character
        numbers = {word: str(n) for n, word in enumerate(_NUMBERS)}
        words = [numbers.get(word, word) for word in out.lower().split()]
        spelt = {"dont": "don't", "none": "0"}
        return " ".join(spelt.get(word, word) for word in words if word not in ("a", "an", "the"))

    people = [text.replace("\n", " ").replace("\t", " ").strip() for text in people]
    submitted = submitted.replace("\n", " ").replace("\t", " ").strip()
    if any(text != people[0] for text in people):
        people, submitted = [changed(text) for text in people], changed(submitted)
    return vqa_consensus(submitted, people)


def gram(rows: Tensor) -> list[list[Tensor]]:
    """z zᵀ, entry by entry."""
    return [[(a * b).sum() for b in rows] for a in rows]


def relation(student: Tensor, teacher: Tensor) -> Tensor:
    """LLaVA-KD's relation distillation (arXiv 2410.16236): 1 - cosine of the flattened Gram matrices of one image's logits."""
    a, b = ([entry for row in gram(z) for entry in row] for z in (student, teacher))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / (sum(x * x for x in a).sqrt() * sum(y * y for y in b).sqrt())


def visual_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """LLaVA-KD's visual distillation: mean over an image's tokens of KL(teacher ‖ student)."""
    return sum(kl(t.log_softmax(0), s.log_softmax(0)) for s, t in zip(student, teacher, strict=True)) / len(student)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference, entry by entry."""
    pairs = list(zip(a.flatten(), b.flatten(), strict=True))
    return sum((x - y) ** 2 for x, y in pairs) / len(pairs)


def focus(attention: Tensor, count: int) -> list[int]:
    """Align-KD: the visual tokens with the most attention, summed over text tokens and heads; [h, t, n] → ids."""
    heads, texts, tokens = attention.shape
    got = [sum(float(attention[h, t, n]) for h in range(heads) for t in range(texts)) for n in range(tokens)]
    return sorted(range(tokens), key=lambda n: -got[n])[:count]


def mixed_heads(attention: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution over heads: [h_T, t, n] → [h_S, t, n]."""
    return torch.stack(
        [sum(w * a for w, a in zip(row, attention, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
    )


def visual_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """CompoDistill (arXiv 2510.12184), one image, entry by entry: [layers, n, n], rows are queries → Σ over layers of 1 - cos."""
    total = torch.zeros((), dtype=student.dtype)
    for mine, theirs in zip(student, teacher, strict=True):
        n, limits = len(mine), []
        for each in (mine, theirs):
            values = each.detach().flatten().tolist()
            mean = sum(values) / len(values)
            limits.append(mean + math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)))
        columns: list[list[Tensor]] = [[], []]
        for key in range(n):
            kept = [
                query
                for query in range(n)
                if mine[query, key] <= limits[0] and theirs[query, key] <= limits[1] and theirs[query, key] != 0
            ]
            for place, each in enumerate((mine, theirs)):
                columns[place].append(sum((each[query, key] for query in kept), torch.zeros(())) / max(1, len(kept)))
        a, b = columns
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        total = total + 1 - dot / (sum(x * x for x in a).sqrt() * sum(y * y for y in b).sqrt())
    return total


def instruction_focus(attention: Tensor) -> list[float]:
    """Align-TI (arXiv 2602.09483), IVA: each visual token's share of what the instruction attends to; [h, t, n] → n shares."""
    heads, texts, tokens = attention.shape
    paid = [sum(float(attention[h, t, n]) for h in range(heads) for t in range(texts)) for n in range(tokens)]
    total = sum(paid)
    return [one / total if total else 1 / tokens for one in paid]


def iva(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    """Align-TI's instruction-aware vision alignment: Σ over an image's tokens of share · KL(teacher ‖ student)."""
    found = [kl(t.log_softmax(0), s.log_softmax(0)) for s, t in zip(student, teacher, strict=True)]
    return sum(share * one for share, one in zip(instruction_focus(attention), found, strict=True))


def instruction_relevance(pairs: list[tuple[list[float], list[float]]]) -> float:
    """Align-TI's score of a layer, of its focus on images under two instructions each: 1 - mean cosine."""
    total = 0.0
    for a, b in pairs:
        total += sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
    return 1 - total / len(pairs)


def assert_attends_within_samples(
    attend, samples: list[list[int]], kv_heads: int, scaling: float | None = None
) -> None:
    """Compare an attention function of transformers' interface with `attention_within_samples`, values and gradients.

    Two packed rows of 8 tokens, 4 heads of 6 numbers, float64. `samples` are the lengths in each row.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 8, 6), (2, kv_heads, 8, 6), (2, kv_heads, 8, 6))
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 4 // kv_heads
    position_ids = torch.tensor([[place for length in row for place in range(length)] for row in samples])
    weigh = torch.randn(2, 8, 4, 6, generator=generator, dtype=torch.float64)
    query = leaves[0] if scaling is None else leaves[0] * scaling * 6**0.5
    given = {} if scaling is None else {"scaling": scaling}
    ways = (
        attend(module, *leaves, None, position_ids=position_ids, **given)[0],
        attention_within_samples(query, *leaves[1:], samples),
    )
    results = [[found, *torch.autograd.grad((found * weigh).sum(), leaves)] for found in ways]
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def attention_within_samples(query: Tensor, key: Tensor, value: Tensor, samples: list[list[int]]) -> Tensor:
    """Softmax attention, token by token, to those of the same sample up to it: [R, h, N, d], [R, h_kv, N, d] twice → [R, N, h, d].

    `samples` are the lengths of the samples of each row.
    """
    rows, heads, _, width = query.shape
    shared = heads // key.shape[1]
    out = []
    for r in range(rows):
        begins = [sum(samples[r][:s]) for s, length in enumerate(samples[r]) for _ in range(length)]
        for n, first in enumerate(begins):
            for h in range(heads):
                keys, values = key[r, h // shared, first : n + 1], value[r, h // shared, first : n + 1]
                scores = torch.stack([query[r, h, n] @ k for k in keys]) / math.sqrt(width)
                out.append(sum(w * v for w, v in zip(scores.softmax(0), values, strict=True)))
    return torch.stack(out).view(rows, -1, heads, width)


def capped(row: list[float], scale: float, softcap: float | None) -> list[float]:
    """One position's logits from the LM head's product, number by number."""
    return [scale * x if softcap is None else softcap * math.tanh(scale * x / softcap) for x in row]
