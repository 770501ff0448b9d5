"""Computes logits with transformers and flash-linear-attention, which are not installed in .venv.

    PYTHONPATH=.venv/fla python tests/fla_from_pypi.py DIRECTORY TEXT ...

Writes the tokens, logits and greedy continuations of the texts to logits.safetensors. fla's kernels
need a GPU. On a CPU their functions are replaced by fla's own reference code, or by PyTorch's
function of the same name where it has none.
"""

import sys

import torch
from fla.layers import multiscale_retention
from fla.modules import mlp
from fla.modules.norm import fused_norm_gate, layernorm, layernorm_gated
from fla.modules.rotary import ops as rotary
from fla.ops.retention.naive import naive_retention
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer


def retention(q, k, v, initial_state, output_final_state, cu_seqlens):
    assert initial_state is None
    assert cu_seqlens is None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return naive_retention(q, k, v).transpose(1, 2), None


def rms_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32):
    return layernorm.rms_norm_ref(x, weight, bias, residual, eps, prenorm)


def rms_norm_gated(x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps):
    assert activation == "swish"
    assert residual is None
    return layernorm_gated.rms_norm_ref(x, weight, bias, z=g, eps=eps)


def rotary_embedding(x, cos, sin, interleaved, seqlen_offsets, cu_seqlens, chunk_indices):
    begin = seqlen_offsets
    cos, sin = (table[begin : begin + x.shape[1]] for table in (cos, sin))
    return rotary.rotary_embedding_ref(x, cos, sin, interleaved)


def swiglu_linear(x, y, weight, bias):
    return functional.linear(functional.silu(x) * y, weight, bias)


multiscale_retention.chunk_retention = retention
multiscale_retention.fused_recurrent_retention = retention
layernorm.rms_norm = rms_norm
fused_norm_gate.rms_norm_gated = rms_norm_gated
rotary.rotary_embedding = rotary_embedding
mlp.swiglu_linear = swiglu_linear


def main(directory, texts):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = {}
    for number, text in enumerate(texts):
        tokens = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
            generated = model.generate(
                tokens, max_new_tokens=1, do_sample=False, use_cache=False, min_new_tokens=1
            )
        assert tokenizer.decode(tokens[0], skip_special_tokens=True) == text
        found |= {
            f"tokens_{number}": tokens[0],
            f"logits_{number}": logits[0],
            f"generated_{number}": generated[0],
        }
    save_file({name: x.contiguous() for name, x in found.items()}, "logits.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
