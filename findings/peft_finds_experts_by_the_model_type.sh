#!/bin/sh
# LoRA with target_modules="all-linear" adapts the experts and the router of a Mixtral, which peft knows by the model type. A subclass that
# differs in model_type alone gets neither, without a warning; the names that the published weights have (w1) are refused for it.
# Seen: mixtral k_proj o_proj q_proj v_proj + mlp.experts, mlp.gate; my_mixtral k_proj o_proj q_proj v_proj
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$work/venv/bin/python" - <<'PY'
import sys
import peft, torch, transformers
from transformers import MixtralConfig, MixtralForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
class MyConfig(MixtralConfig):
    model_type = "my_mixtral"
class MyMixtral(MixtralForCausalLM):
    config_class = MyConfig
found = {}
for made, config in ((MixtralForCausalLM, MixtralConfig), (MyMixtral, MyConfig)):
    model = made(config(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {name.split("layers.0.")[1].split(".lora_")[0].removesuffix(".base_layer") for name, p in adapted.named_parameters() if p.requires_grad}
    found[config.model_type] = sorted(names)
    print(config.model_type, *found[config.model_type])
attention = [f"self_attn.{name}_proj" for name in "koqv"]
seen = found == {"mixtral": ["mlp.experts", "mlp.gate", *attention], "my_mixtral": attention}
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
