"""Writes model/: a base model in the layout of Qwen2.5, small and untrained, with a tokenizer made from chats.jsonl.

usage: python make_model.py    (needs numpy, tokenizers; the template in model/ is written by hand)
"""
import json
import pathlib
import struct

import numpy
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "model"
HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 128, 2, 4, 2, 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2.5 has these as added tokens that are not special.
ADDED = ["<tool_call>", "</tool_call>"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(name, value):
    (MODEL / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def tokenizer():
    """Byte-level BPE as Qwen's: ids of merges first, then added tokens; fewer ids than the model has rows."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    chats = [json.loads(line) for line in (HERE / "chats.jsonl").read_text().splitlines()]
    texts = [message["content"] for chat in chats for message in chat["messages"]] + ["system\nuser\nassistant\n"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(SPECIAL)
    made.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in ADDED])
    made.save(str(MODEL / "tokenizer.json"))
    return made


def weights():
    """Names and shapes of Qwen2ForCausalLM with tied embeddings; matrices of standard deviation 0.02."""
    head = HIDDEN // HEADS
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (HIDDEN,)
        for name, rows in [("q", HIDDEN), ("k", KV_HEADS * head), ("v", KV_HEADS * head)]:
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, HIDDEN)
            yield f"{layer}.self_attn.{name}_proj.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{layer}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{layer}.mlp.gate_proj.weight", (MLP, HIDDEN)
        yield f"{layer}.mlp.up_proj.weight", (MLP, HIDDEN)
        yield f"{layer}.mlp.down_proj.weight", (HIDDEN, MLP)
    yield "model.norm.weight", (HIDDEN,)


def save():
    """A safetensors file in bf16: a header of JSON, then the upper halves of the floats."""
    rng, header, body = numpy.random.default_rng(1), {"__metadata__": {"format": "pt"}}, b""
    for name, shape in weights():
        if len(shape) == 2:
            values = rng.normal(0, 0.02, shape)
        else:
            values = numpy.full(shape, float("norm" in name))
        data = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (MODEL / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)


def main():
    ids = tokenizer()
    end = ids.token_to_id("<|endoftext|>")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": MLP,
        "max_position_embeddings": 512,
        "max_window_layers": LAYERS,
        "model_type": "qwen2",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }
    write("config.json", config)
    write("generation_config.json", {"bos_token_id": end, "do_sample": False, "eos_token_id": end})
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write("tokenizer_config.json", settings)
    save()


if __name__ == "__main__":
    main()
