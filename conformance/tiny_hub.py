"""Fake Hugging Face cache of tiny random models so that PEFT's hub-dependent tests can run offline.

  HF_HOME=FOLDER HF_HUB_OFFLINE=1 python fake_hub_cache.py      # then run pytest with the same two variables

Also needed: make tests/testing_utils.py::hub_online_once never go online (set `is_offline = True`), else
it un-sets offline mode for the first access of each model id and waits for network time-outs."""

import os
import shutil

import torch
import transformers as T

small = dict(
    vocab_size=1024,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
moe = dict(small, head_dim=8)
enc = dict(vocab_size=1124, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
opt = lambda: T.OPTForCausalLM(
    T.OPTConfig(
        vocab_size=50265,
        hidden_size=16,
        ffn_dim=4,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=100,
        word_embed_proj_dim=16,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
)
gpt2 = lambda: T.GPT2LMHeadModel(
    T.GPT2Config(
        vocab_size=1000,
        n_embd=32,
        n_layer=5,
        n_head=4,
        n_positions=512,
        bos_token_id=98,
        eos_token_id=98,
        pad_token_id=98,
    )
)
llama = lambda: T.LlamaForCausalLM(
    T.LlamaConfig(
        vocab_size=32000,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
)
bert = lambda: T.BertForSequenceClassification(T.BertConfig(**enc))
t5 = lambda: T.T5ForConditionalGeneration(
    T.T5Config(
        vocab_size=1103, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
)
P, H, L = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"
MODELS = {
    P + "tiny-random-OPTForCausalLM": opt,
    H + "tiny-random-OPTForCausalLM": opt,
    P + "opt-125m": opt,
    "facebook/opt-125m": opt,
    P + "tiny-random-GPT2LMHeadModel": gpt2,
    P + "tiny-random-gpt2": gpt2,
    H + "tiny-random-gpt2": gpt2,
    H + "tiny-random-GPT2LMHeadModel": gpt2,
    P + "tiny-dummy-qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**small)),
    P + "tiny-random-LlamaForCausalLM": llama,
    H + "tiny-random-LlamaForCausalLM": llama,
    L + "tiny-random-LlamaForCausalLM": llama,
    H + "tiny-random-MistralForCausalLM": lambda: T.MistralForCausalLM(T.MistralConfig(**small)),
    H + "tiny-random-Gemma3ForCausalLM": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**moe)),
    P + "tiny-random-GPTJForCausalLM": lambda: T.GPTJForCausalLM(
        T.GPTJConfig(
            vocab_size=1000,
            n_embd=32,
            n_layer=2,
            n_head=4,
            rotary_dim=4,
            n_positions=128,
            bos_token_id=98,
            eos_token_id=98,
        )
    ),
    P + "tiny-random-GPTNeoXForCausalLM": lambda: T.GPTNeoXForCausalLM(
        T.GPTNeoXConfig(
            vocab_size=1000, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=37
        )
    ),
    P + "tiny-random-BloomForCausalLM": lambda: T.BloomForCausalLM(
        T.BloomConfig(vocab_size=1000, hidden_size=32, n_layer=5, n_head=4)
    ),
    H + "Mixtral-tiny": lambda: T.MixtralForCausalLM(T.MixtralConfig(**small, num_local_experts=8)),
    L + "tiny-Qwen3MoeForCausalLM": lambda: T.Qwen3MoeForCausalLM(
        T.Qwen3MoeConfig(**moe, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    L + "tiny-GptOssForCausalLM": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(**moe, num_local_experts=4, num_experts_per_tok=2)
    ),
    L + "tiny-Llama4ForCausalLM": lambda: T.Llama4ForCausalLM(
        T.Llama4TextConfig(**moe, intermediate_size_mlp=64, num_local_experts=4, pad_token_id=0)
    ),
    P + "tiny-random-BertModel": lambda: T.BertModel(T.BertConfig(**enc)),
    P + "tiny-random-RobertaModel": lambda: T.RobertaModel(T.RobertaConfig(**enc)),
    P + "tiny-random-DebertaModel": lambda: T.DebertaModel(T.DebertaConfig(**enc)),
    P + "tiny-random-DebertaV2Model": lambda: T.DebertaV2Model(T.DebertaV2Config(**enc)),
    P + "tiny-random-BertForSequenceClassification": bert,
    H + "tiny-random-BertForSequenceClassification": bert,
    P + "tiny-random-RobertaForSequenceClassification": lambda: T.RobertaForSequenceClassification(
        T.RobertaConfig(**enc)
    ),
    L + "tiny-LlamaForSequenceClassification-3.2": lambda: T.LlamaForSequenceClassification(
        T.LlamaConfig(**small, pad_token_id=0)
    ),
    P + "tiny-random-BartForConditionalGeneration": lambda: T.BartForConditionalGeneration(
        T.BartConfig(
            vocab_size=1024,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=4,
            decoder_ffn_dim=4,
            max_position_embeddings=100,
        )
    ),
    P + "tiny-random-t5": t5,
    P + "tiny-random-T5ForConditionalGeneration": t5,
    P + "tiny-random-T5ForConditionalGeneration-calibrated": t5,
    H + "tiny-random-T5ForConditionalGeneration": t5,
}
REV = "0" * 40
for mid, mk in MODELS.items():
    torch.manual_seed(0)
    root = os.path.join(os.environ["HF_HOME"], "hub", "models--" + mid.replace("/", "--"))
    snap = os.path.join(root, "snapshots", REV)
    shutil.rmtree(root, ignore_errors=True)
    os.makedirs(os.path.join(root, "refs")), os.makedirs(snap)
    open(os.path.join(root, "refs", "main"), "w").write(REV)
    try:
        mk().save_pretrained(snap)
    except Exception as e:
        print("skip", mid, repr(e)[:150])
        shutil.rmtree(root, ignore_errors=True)
