"""Dimensions of well-known public checkpoints, from their ``config.json``; an adapter's shapes can fit them.

Fine-tunes (Instruct, Chat, Coder, Math and others) have the dimensions of their base model, so one row is enough.
"""

from dataclasses import dataclass

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class KnownBase:
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of each kind of linear layer of the decoder."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def square(self) -> list[str]:
        """The kinds of layers that the trainer's LoRA adapts: the square ones."""
        return [kind for kind, (rows, columns) in self.linears().items() if rows == columns]


KNOWN_BASES = (
    KnownBase("SmolLM-135M, SmolLM2-135M", 30, 576, 9, 3, 64, 1536),
    KnownBase("SmolLM-360M, SmolLM2-360M", 32, 960, 15, 5, 64, 2560),
    KnownBase("SmolLM-1.7B, SmolLM2-1.7B", 24, 2048, 32, 32, 64, 8192),
    KnownBase("TinyLlama-1.1B", 22, 2048, 32, 4, 64, 5632),
    KnownBase("Llama-3.2-1B", 16, 2048, 32, 8, 64, 8192),
    KnownBase("Llama-3.2-3B", 28, 3072, 24, 8, 128, 8192),
    KnownBase("Llama-3-8B, Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336),
    KnownBase("Llama-3-70B, Llama-3.1-70B, Llama-3.3-70B", 80, 8192, 64, 8, 128, 28672),
    KnownBase("Llama-2-7B", 32, 4096, 32, 32, 128, 11008),
    KnownBase("Llama-2-13B", 40, 5120, 40, 40, 128, 13824),
    KnownBase("Llama-2-70B", 80, 8192, 64, 8, 128, 28672),
    KnownBase("Mistral-7B v0.1, v0.2, v0.3", 32, 4096, 32, 8, 128, 14336),
    KnownBase("Qwen2-0.5B, Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864),
    KnownBase("Qwen2-1.5B, Qwen2.5-1.5B", 28, 1536, 12, 2, 128, 8960),
    KnownBase("Qwen2.5-3B", 36, 2048, 16, 2, 128, 11008),
    KnownBase("Qwen2-7B, Qwen2.5-7B", 28, 3584, 28, 4, 128, 18944),
    KnownBase("Qwen2.5-14B", 48, 5120, 40, 8, 128, 13824),
    KnownBase("Qwen2.5-32B", 64, 5120, 40, 8, 128, 27648),
    KnownBase("Qwen2-72B, Qwen2.5-72B", 80, 8192, 64, 8, 128, 29568),
    KnownBase("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072),
    KnownBase("Qwen3-1.7B", 28, 2048, 16, 8, 128, 6144),
    KnownBase("Qwen3-4B", 36, 2560, 32, 8, 128, 9728),
    KnownBase("Qwen3-8B", 36, 4096, 32, 8, 128, 12288),
    KnownBase("Qwen3-14B", 40, 5120, 40, 8, 128, 17408),
    KnownBase("Qwen3-32B", 64, 5120, 64, 8, 128, 25600),
)
