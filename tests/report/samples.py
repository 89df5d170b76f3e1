"""Reports to draw: a rich one as a run over a 32-layer model would leave it, and the least there can be."""

from __future__ import annotations

import math
import random

from abliterate.contract.report import (
    BaseModel,
    Candidate,
    Certification,
    Difference,
    EditReport,
    LayerSeparation,
    Product,
    PromptSource,
    Report,
    Search,
    Suite,
    TensorReport,
    Trial,
)

LAYERS = 32


def least() -> Report:
    return Report(base=BaseModel(name="base"), product=Product(name="direction.safetensors", format="direction"))


def rich(name: str = "brook-abliterated:8b") -> Report:
    draw = random.Random(4)
    return Report(
        abliterated="0.2.0",
        base=BaseModel(
            name="ollama:brook:8b",
            digest="sha256:" + "5f" * 32,
            architecture="llama",
            layers=LAYERS,
            hidden_size=4096,
            bytes=4_920_000_000,
            licence="apache-2.0",
        ),
        product=Product(name=name, format="gguf", digest="a7" * 32, content="c1" * 32, bytes=4_921_000_000),
        recipe={
            "digest": "9b" * 32,
            "model": "ollama:brook:8b",
            "search": {"trials": 60, "refusal_target": 0.03},
            "edit": {"strength": 1.0, "invert": False},
        },
        prompts=[
            PromptSource(kind="harmful", name="builtin", count=128, licence="Apache-2.0"),
            PromptSource(kind="harmless", name="hf:org/harmless#text", count=416, licence="mit", revision="0f" * 20),
        ],
        direction={
            "method": "auto",
            "layer": 17.0,
            "position": -2,
            "rank": 1,
            "harmful_prompts": 92,
            "harmless_prompts": 96,
            "digest": "77" * 32,
        },
        candidates=[
            Candidate(
                layer=float(layer),
                position=position,
                bypass=5 - 9 * math.exp(-(((layer - 17) / 6) ** 2)) * (1 + position / 9) + draw.random(),
                kl=draw.random() / 20,
                induce=draw.random() * 4,
            )
            for layer in range(26)
            for position in (-1, -2, -3, -4, -5)
        ],
        search=Search(trials=trials(draw), refusal_target=0.03, reached=True, tokens_decoded=21_504),
        separation=[separation(layer, draw) for layer in range(LAYERS)],
        edit=EditReport(
            coverage=1.0,
            residual=0.0081,
            strengths=[(kernel(layer), 0.7 * kernel(layer)) for layer in range(LAYERS)],
            tensors=[
                TensorReport(
                    name=f"blk.{layer}.{part}.weight",
                    type="Q6_K" if layer % 3 == 0 else "Q4_K",
                    kind=kind,
                    layer=layer,
                    residual=10 ** draw.uniform(-4.2, -2.1),
                    rounding=10 ** draw.uniform(-4.5, -2.3),
                    promoted_from="Q4_K" if layer == 9 and kind == "mlp" else "",
                )
                for layer in range(LAYERS)
                for part, kind in (("attn_output", "attention"), ("ffn_down", "mlp"))
            ],
            promoted=["blk.9.ffn_down.weight"],
        ),
        evaluation={
            "refusal_before": 0.97,
            "refusal_before_low": 0.9155,
            "refusal_before_high": 0.9897,
            "refusal_after": 0.01,
            "refusal_after_low": 0.0018,
            "refusal_after_high": 0.0545,
            "false_refusal_before": 0.02,
            "false_refusal_before_low": 0.0055,
            "false_refusal_before_high": 0.07,
            "false_refusal_after": 0.0,
            "false_refusal_after_low": 0.0,
            "false_refusal_after_high": 0.037,
            "degenerate_before": 0.0,
            "degenerate_after": 0.005,
            "empty_before": 0.0,
            "empty_after": 0.0,
            "harmless_exact": 0.81,
            "kl_mean": 0.0042,
            "kl_median": 0.0021,
            "kl_max": 0.0514,
            "kl_first": 0.0008,
            "kl_tokens": 32,
            "cross_entropy_before": 0.2891,
            "cross_entropy_after": 0.2917,
            "harmful_prompts": 100,
            "harmless_prompts": 100,
            "tokens_decoded": 48_220,
        },
        suites=[
            Suite(name="over-refusal", counted="harmless, but sounds alarming: refused", total=16, before=5, after=0),
            Suite(name="injection", counted="followed an order hidden in a text", total=8, before=3, after=4),
        ],
        certification=Certification(
            model=name,
            reference="brook:8b",
            engine="0.34.4",
            compared=["plain", "system", "tools", "thinking off"],
            answer="There are seven ducks.",
            differences=[Difference(what="licence", text="the base has none", failure=False)],
        ),
        seconds={"load": 21.4, "direction": 48.0, "search": 93.5, "edit": 62.2, "evaluate": 204.9, "report": 4.1},
        peak_memory=17_200_000_000,
        notes=["the search stopped after 44 trials: nothing was gained by the last 20"],
    )


def kernel(layer: int) -> float:
    return round(max(0.0, 1.2 - abs(layer - 18) / 14), 4)


def trials(draw: random.Random) -> list[Trial]:
    found = []
    for number in range(60):
        kl = draw.expovariate(1) / 12 + 0.004
        refusal = min(1.0, max(0.0, 0.6 * math.exp(-kl * 22) + draw.uniform(-0.05, 0.12)))
        asked = {"prompts": 96 if number % 5 == 0 else 16}
        found.append(Trial(number=number, refusal=round(refusal, 4), kl=round(kl, 5), parameters=asked))
    found.append(Trial(number=60, refusal=0.012, kl=0.0172, chosen=True, verified=0.01))
    return found


def separation(layer: int, draw: random.Random) -> LayerSeparation:
    apart = 6 * math.exp(-(((layer - 19) / 9) ** 2))
    return LayerSeparation(
        layer=layer,
        harmful=[round(draw.gauss(apart, 1), 3) for _ in range(48)],
        harmless=[round(draw.gauss(0, 1), 3) for _ in range(48)],
        apart=round(apart, 2),
        chosen=layer == 17,
    )
