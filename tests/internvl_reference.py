"""InternVL's original model written down a second time, from its formulas and on plain tensors.

Sources: OpenGVLab/InternVL at 2410d1d, ``internvl_chat/internvl/model`` (modeling_internlm2.py,
modeling_intern_vit.py, modeling_internvl_chat.py).  Nothing here knows a name of the native classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_TOKEN = 299


def tiny_config(language: str = "internlm2", **changes) -> dict:
    """A ``config.json`` of the original layout: true architecture, tiny sizes."""
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    if language == "internlm2":
        own = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
        own |= {"rope_theta": 1_000_000, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    else:
        own = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1_000_000.0}
    big_tower = changes.pop("big_tower", False)
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 28,
        "patch_size": 7,
        "qkv_bias": not big_tower,
        "qk_normalization": big_tower,
        "norm_type": "rms_norm" if big_tower else "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
    config = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "force_image_size": 28,
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "template": "internvl2_5",
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "llm_config": {**text, **own},
        "vision_config": vision,
    }
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        (config[f"{part}_config"] if part else config)[field or name] = value
    return config


def tiny_tensors(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """A random checkpoint of the original layout."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = config["vision_config"], config["llm_config"]
    shapes = {**_vision_shapes(vision), **_projector_shapes(vision, text)}
    shapes |= _internlm2_shapes(text) if text["model_type"] == "internlm2" else _qwen2_shapes(text)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.5 if len(shape) == 1 else 1 / math.sqrt(shape[-1])
        tensors[name] = torch.randn(shape, generator=generator) * scale
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
    return tensors


def _vision_shapes(vision: dict) -> dict[str, tuple[int, ...]]:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    places = (vision["image_size"] // patch) ** 2 + 1
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, places, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (width,),
    }
    for layer in range(vision["num_hidden_layers"]):
        own = {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width)}
        own |= {"attn.proj.bias": (width,), "ls1": (width,), "ls2": (width,)}
        own |= {"mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,)}
        own |= {"mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
        own |= {"norm1.weight": (width,), "norm2.weight": (width,)}
        if vision["qkv_bias"]:
            own["attn.qkv.bias"] = (3 * width,)
        if vision["qk_normalization"]:
            own |= {"attn.q_norm.weight": (width,), "attn.k_norm.weight": (width,)}
        if vision["norm_type"] == "layer_norm":
            own |= {"norm1.bias": (width,), "norm2.bias": (width,)}
        shapes |= {f"vision_model.encoder.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def _projector_shapes(vision: dict, text: dict) -> dict[str, tuple[int, ...]]:
    wide, width = 4 * vision["hidden_size"], text["hidden_size"]
    return {
        **{"mlp1.0.weight": (wide,), "mlp1.0.bias": (wide,)},
        **{"mlp1.1.weight": (width, wide), "mlp1.1.bias": (width,)},
        **{"mlp1.3.weight": (width, width), "mlp1.3.bias": (width,)},
    }


def _internlm2_shapes(text: dict) -> dict[str, tuple[int, ...]]:
    width, inner, words = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    rows = width + 2 * text["num_key_value_heads"] * width // text["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.tok_embeddings.weight": (words, width),
        "language_model.model.norm.weight": (width,),
        "language_model.output.weight": (words, width),
    }
    for layer in range(text["num_hidden_layers"]):
        own: dict[str, tuple[int, ...]] = {
            "attention.wqkv.weight": (rows, width),
            "attention.wo.weight": (width, width),
            "feed_forward.w1.weight": (inner, width),
            "feed_forward.w2.weight": (width, inner),
            "feed_forward.w3.weight": (inner, width),
            "attention_norm.weight": (width,),
            "ffn_norm.weight": (width,),
        }
        if text["bias"]:
            own |= {"attention.wqkv.bias": (rows,), "attention.wo.bias": (width,)}
        shapes |= {f"language_model.model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def _qwen2_shapes(text: dict) -> dict[str, tuple[int, ...]]:
    width, inner, words = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    narrow = text["num_key_value_heads"] * width // text["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (words, width),
        "language_model.model.norm.weight": (width,),
    }
    if not text["tie_word_embeddings"]:
        shapes["language_model.lm_head.weight"] = (words, width)
    for layer in range(text["num_hidden_layers"]):
        own: dict[str, tuple[int, ...]] = {
            **{"self_attn.q_proj.weight": (width, width), "self_attn.q_proj.bias": (width,)},
            **{"self_attn.k_proj.weight": (narrow, width), "self_attn.k_proj.bias": (narrow,)},
            **{"self_attn.v_proj.weight": (narrow, width), "self_attn.v_proj.bias": (narrow,)},
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }
        shapes |= {f"language_model.model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


class Original:
    """The original's forward pass on a checkpoint of its own layout, in the tensors' dtype."""

    def __init__(self, config: dict, tensors: dict[str, Tensor]) -> None:
        self.config, self.t = config, tensors
        self.text, self.vision = config["llm_config"], config["vision_config"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"))

    def rms(self, name: str, x: Tensor, eps: float) -> Tensor:
        return self.t[f"{name}.weight"] * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

    def vision_norm(self, name: str, x: Tensor) -> Tensor:
        eps = self.vision["layer_norm_eps"]
        if self.vision["norm_type"] == "rms_norm":
            return self.rms(name, x, eps)
        return F.layer_norm(x, x.shape[-1:], self.t[f"{name}.weight"], self.t[f"{name}.bias"], eps)

    def tower(self, pixels: Tensor) -> Tensor:
        """(tiles, 3, side, side) to the hidden states of ``select_layer``, (tiles, 1 + patches, width)."""
        at, patch = "vision_model.embeddings.", self.vision["patch_size"]
        x = F.conv2d(
            pixels, self.t[f"{at}patch_embedding.weight"], self.t[f"{at}patch_embedding.bias"], stride=patch
        )
        x = x.flatten(2).transpose(1, 2)
        first = self.t[f"{at}class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.t[f"{at}position_embedding"]
        states = [x]
        for layer in range(self.vision["num_hidden_layers"]):
            name = f"vision_model.encoder.layers.{layer}"
            x = x + self.vision_attention(name, self.vision_norm(f"{name}.norm1", x)) * self.t[f"{name}.ls1"]
            inner = self.linear(f"{name}.mlp.fc1", self.vision_norm(f"{name}.norm2", x))
            x = x + self.linear(f"{name}.mlp.fc2", F.gelu(inner)) * self.t[f"{name}.ls2"]
            states.append(x)
        return states[self.config["select_layer"]]

    def vision_attention(self, name: str, x: Tensor) -> Tensor:
        heads = self.vision["num_attention_heads"]
        query, key, value = self.linear(f"{name}.attn.qkv", x).unflatten(-1, (3, -1)).unbind(2)
        if self.vision["qk_normalization"]:
            query, key = (
                self.rms(f"{name}.attn.{which}_norm", part, self.vision["layer_norm_eps"])
                for which, part in (("q", query), ("k", key))
            )
        query, key, value = (part.unflatten(-1, (heads, -1)) for part in (query, key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
        return self.linear(f"{name}.attn.proj", mixed)

    def image_features(self, pixels: Tensor) -> Tensor:
        """(tiles, patches / 4, language width): pixel shuffle by 0.5, then mlp1."""
        x = self.tower(pixels)[:, 1:]
        side = math.isqrt(x.shape[1])
        # Token (i, j) of the result is the 2 x 2 square of patches at (2i, 2j), its rows first.
        x = x.view(len(x), side // 2, 2, side // 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(len(x), (side // 2) ** 2, -1)
        x = F.layer_norm(x, x.shape[-1:], self.t["mlp1.0.weight"], self.t["mlp1.0.bias"])
        return self.linear("mlp1.3", F.gelu(self.linear("mlp1.1", x)))

    def logits(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        """(rows, tokens) and the tiles of all their images to (rows, tokens, words)."""
        internlm2 = self.text["model_type"] == "internlm2"
        at = "language_model.model."
        x = self.t[f"{at}{'tok_embeddings' if internlm2 else 'embed_tokens'}.weight"][ids]
        if pixels is not None:
            x[ids == IMAGE_TOKEN] = self.image_features(pixels).flatten(0, 1)
        for layer in range(self.text["num_hidden_layers"]):
            x = (self.internlm2_layer if internlm2 else self.qwen2_layer)(f"{at}layers.{layer}", x)
        x = self.rms(f"{at}norm", x, self.text["rms_norm_eps"])
        if self.text["tie_word_embeddings"]:
            return x @ self.t[f"{at}embed_tokens.weight"].T
        return self.linear(f"language_model.{'output' if internlm2 else 'lm_head'}", x)

    def internlm2_layer(self, name: str, x: Tensor) -> Tensor:
        eps, kv_heads = self.text["rms_norm_eps"], self.text["num_key_value_heads"]
        groups = self.text["num_attention_heads"] // kv_heads
        fused = self.linear(f"{name}.attention.wqkv", self.rms(f"{name}.attention_norm", x, eps))
        fused = fused.unflatten(-1, (kv_heads, groups + 2, -1))  # batch, token, kv head, place, feature
        query = fused[..., :groups, :].flatten(2, 3)
        x = x + self.linear(
            f"{name}.attention.wo", self.attention(query, fused[..., -2, :], fused[..., -1, :])
        )
        inner = self.rms(f"{name}.ffn_norm", x, eps)
        gate = F.silu(self.linear(f"{name}.feed_forward.w1", inner))
        return x + self.linear(
            f"{name}.feed_forward.w2", gate * self.linear(f"{name}.feed_forward.w3", inner)
        )

    def qwen2_layer(self, name: str, x: Tensor) -> Tensor:
        eps = self.text["rms_norm_eps"]
        inner = self.rms(f"{name}.input_layernorm", x, eps)
        head = self.text["hidden_size"] // self.text["num_attention_heads"]
        parts = [self.linear(f"{name}.self_attn.{p}_proj", inner).unflatten(-1, (-1, head)) for p in "qkv"]
        x = x + self.linear(f"{name}.self_attn.o_proj", self.attention(*parts))
        inner = self.rms(f"{name}.post_attention_layernorm", x, eps)
        gate = F.silu(self.linear(f"{name}.mlp.gate_proj", inner))
        return x + self.linear(f"{name}.mlp.down_proj", gate * self.linear(f"{name}.mlp.up_proj", inner))

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(rows, tokens, heads, head) each; causal, with rotary positions and shared key-value heads."""
        tokens, repeats = query.shape[1], query.shape[2] // key.shape[2]
        query, key = self.rotated(query), self.rotated(key)
        key, value = (part.repeat_interleave(repeats, dim=2) for part in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)

    def rotated(self, x: Tensor) -> Tensor:
        tokens, size = x.shape[1], x.shape[-1]
        base, most = float(self.text["rope_theta"]), self.text["max_position_embeddings"]
        scaling = self.text.get("rope_scaling")
        if scaling and scaling["type"] == "dynamic" and tokens > most:  # NTK-aware, by the row's length
            factor = scaling["factor"]
            base *= (factor * tokens / most - (factor - 1)) ** (size / (size - 2))
        angles = torch.arange(tokens)[:, None] / base ** (torch.arange(0, size, 2) / size)
        cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos + half * sin
