//! G12: a config that lies is a typed error that names file and key, before memory is taken on its
//! word. The largest sizes here would end the process.

use serde_json::{Value, json};
use warpo::{
    Error,
    models::{FAMILIES, Head},
};

use super::{
    golden::folders,
    weights::{Folder, put},
};

/// Model, key and value -> the message, about `config.json` unless it begins with another file.
const HOSTILE: &str = r#"
gpt2 model_type "gpt3" -> `model_type` is gpt3, wanted one of FAMILIES
gpt2 model_type null -> `model_type` is missing
gpt2 model_type 2 -> `model_type` is 2, wanted a string
gpt2 n_embd "40" -> `n_embd` is "40", wanted a whole number
gpt2 n_embd -40 -> `n_embd` is -40, wanted a whole number
gpt2 n_embd 40.5 -> `n_embd` is 40.5, wanted a whole number
gpt2 n_embd 18446744073709551615 -> `n_embd` is 18446744073709551615, wanted a multiple of `n_head` = 4
gpt2 n_embd 18446744073709551612 -> `hidden size` is 18446744073709551612, wanted a number from 1 to 1048576
llama hidden_size 1048576 -> DIR/model.safetensors: `model.embed_tokens.weight` has shape [151, 64], wanted [151, 1048576]
gpt2 n_head 3 -> `n_embd` is 40, wanted a multiple of `n_head` = 3
gpt2 n_head 0 -> `n_embd` is 40, wanted a multiple of `n_head` = 0
gpt2 vocab_size 0 -> `vocab_size` is 0, wanted a number from 1 to 16777216
gpt2 vocab_size 16777217 -> `vocab_size` is 16777217, wanted a number from 1 to 16777216
gpt2 vocab_size 16777216 -> DIR/model.safetensors: `transformer.wte.weight` has shape [260, 40], wanted [16777216, 40]
gpt2 n_positions 16777216 -> DIR/model.safetensors: `transformer.wpe.weight` has shape [96, 40], wanted [16777216, 40]
gpt2 n_inner 4194304 -> DIR/model.safetensors: `transformer.h.0.mlp.c_fc.weight` has shape [40, 100], wanted [40, 4194304]
gpt2 n_layer 4097 -> `number of layers` is 4097, wanted a number from 1 to 4096
gpt2 n_layer 4096 -> `number of layers` is 4096, wanted at most the number of stored tensors, 28
gpt2 n_layer 3 -> DIR: `transformer.h.2.ln_1.weight` is missing
gpt2 activation_function "sin" -> `activation_function` = "sin" is not supported, wanted gelu_new, gelu, silu, relu or quick_gelu
gpt2 add_cross_attention true -> `add_cross_attention` = true is not supported, wanted false
gpt2 scale_attn_by_inverse_layer_idx true -> `scale_attn_by_inverse_layer_idx` = true is not supported, wanted false
gpt2 reorder_and_upcast_attn true -> `reorder_and_upcast_attn` = true is not supported, wanted false
gpt2 scale_attn_weights false -> `scale_attn_weights` = false is not supported, wanted true
gpt2 tie_word_embeddings "no" -> `tie_word_embeddings` is "no", wanted true or false
gpt2 layer_norm_epsilon -1 -> `epsilon of the norms` is -1, wanted 0 or more
gpt2 layer_norm_epsilon "1e-5" -> `layer_norm_epsilon` is "1e-5", wanted a number
llama vocab_size 150 -> DIR/model.safetensors: `model.embed_tokens.weight` has shape [151, 64], wanted [150, 64]
llama num_key_value_heads 3 -> `number of key-value heads` is 3, wanted a divisor of the 4 query heads
llama num_key_value_heads 0 -> `number of key-value heads` is 0, wanted a number from 1 to 65536
llama num_key_value_heads 4 -> DIR/model.safetensors: `model.layers.0.self_attn.k_proj.weight` has shape [32, 64], wanted [64, 64]
llama num_attention_heads 65536 -> DIR/model.safetensors: `model.layers.0.self_attn.q_proj.weight` has shape [64, 64], wanted [1048576, 64]
llama head_dim 15 -> `head_dim` is 15, wanted an even number
llama head_dim 258 -> `head_dim` is 258, wanted a number from 1 to 256
llama head_dim 18446744073709551615 -> `head_dim` is 18446744073709551615, wanted a number from 1 to 256
llama intermediate_size 4194304 -> DIR/model.safetensors: `model.layers.0.mlp.gate_proj.weight` has shape [56, 64], wanted [4194304, 64]
llama max_position_embeddings 16777216 -> `number of positions` is 16777216, wanted fewer: their rotary table would have 1073741824 bytes, the weights have 262912
llama attention_bias true -> DIR: `model.layers.0.self_attn.q_proj.bias` is missing
llama rope_parameters [] -> `rope_parameters` is [], wanted an object
llama rope_parameters {"rope_type": "spiral"} -> `rope_parameters.rope_type` is spiral, wanted one of default, linear, dynamic, llama3, yarn, longrope
llama rope_parameters {"rope_type": "linear"} -> `rope_parameters.factor` is missing
llama rope_parameters {"rope_type": "yarn", "factor": 4, "short_factor": [1]} -> `rope_parameters.short_factor` is [1], wanted no such key for rope_type yarn
llama rope_parameters {"rope_type": "longrope"} -> `rope_parameters.short_factor` is missing
llama rope_parameters {"rope_type": "longrope", "short_factor": [1, 2]} -> `longrope` is 2, wanted 8 numbers in each list
llama rope_parameters {"rope_type": "longrope", "short_factor": [1, "2"]} -> `rope_parameters.short_factor` is "2", wanted a number from 0.001 to 1e15
mistral sliding_window 0 -> `sliding_window` is 0, wanted a positive whole number or null
mistral layer_types ["sliding_attention"] -> `layer_types` = ["sliding_attention"] is not supported, wanted full_attention for each layer
ministral layer_types ["sliding_attention"] -> `layer_types` is 1 long, wanted one for each of 3 layers
ministral layer_types ["sliding_attention", "chunked_attention", 3] -> `layer_types` is "chunked_attention", wanted sliding_attention or full_attention
qwen2 layer_types ["sliding_attention", "full_attention"] -> `layer_types` = ["sliding_attention","full_attention"] is not supported, wanted full_attention without a window
smollm3 no_rope_layers [1, 1, 1, 2] -> `no_rope_layers` is [1,1,1,2], wanted 0 or 1 for each of 4 layers
granite residual_multiplier 0 -> `factor on the residual stream` is 0, wanted a number from 1e-6 to 1e6
granite attention_multiplier -1 -> `factor on attention scores` is -1, wanted a number from 1e-6 to 1e6
gemma2 final_logit_softcapping 0 -> `soft-cap of logits` is 0, wanted a number from 1e-6 to 1e6
gemma2 use_bidirectional_attention true -> `use_bidirectional_attention` = true is not supported, wanted false
gemma3 rope_parameters {"full_attention": {}, "chunked_attention": {}} -> `rope_parameters.chunked_attention` is {}, wanted rotary positions of full_attention and sliding_attention
gemma3 rope_parameters {"full_attention": 3} -> `rope_parameters.full_attention` is 3, wanted an object
phi3 rope_parameters {"partial_rotary_factor": 2} -> `partial_rotary_factor` is 2, wanted a part of 8 channels that is even
llama rope_parameters {"rope_type": 3} -> `rope_parameters.rope_type` is no string, wanted one of default, linear, dynamic, llama3, yarn, longrope
llama rope_parameters {"rope_theta": 0} -> `rope_parameters.rope_theta` is 0, wanted a number from 0.001 to 1e15
llama rope_parameters {"rope_type": "llama3", "low_freq_factor": 1} -> `rope_parameters.high_freq_factor` is missing
llama rope_parameters {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4} -> `rope_parameters.high_freq_factor` is 4, wanted above low_freq_factor = 4
llama rope_parameters {"partial_rotary_factor": 0.5} -> `rope_parameters.partial_rotary_factor` is 0.5, wanted no such key for rope_type default
llama rope_parameters {"full_attention": {"rope_theta": 1e6}} -> `rope_parameters.full_attention` is {"rope_theta":1000000.0}, wanted no such key for rope_type default
llama rope_parameters {"factor": 8} -> `rope_parameters.factor` is 8, wanted no such key for rope_type default
llama rope_parameters {"rope_theta": 1e16} -> `rope_parameters.rope_theta` is 1e+16, wanted a number from 0.001 to 1e15
llama partial_rotary_factor 0.5 -> `partial_rotary_factor` = 0.5 is not supported, wanted 1
llama no_rope_layers [1, 0] -> `no_rope_layers` = [1,0] is not supported, wanted 1 for each layer
llama layer_types ["full_attention", "sliding_attention"] -> `layer_types` = ["full_attention","sliding_attention"] is not supported, wanted full_attention for each layer
llama sliding_window 4 -> `sliding_window` = 4 is not supported, wanted null
llama logits_scaling 8.0 -> `logits_scaling` = 8.0 is not supported, wanted 1
llama final_logit_softcapping 30.0 -> `final_logit_softcapping` = 30.0 is not supported, wanted null
llama quantization_config {"bits": 4} -> `quantization_config` = {"bits":4} is not supported, wanted null
llama num_experts 8 -> `num_experts` = 8 is not supported, wanted 0
gpt2 qk_norm true -> `qk_norm` = true is not supported, wanted false
llama architectures ["LlamaForSequenceClassification"] -> `architectures` is LlamaForSequenceClassification, wanted a language model: it is a reward model
"#;

/// Keys that other models compute with, at values that change nothing.
#[test]
fn a_key_that_changes_nothing_is_read() {
    let plain = Folder::copy("neutral", "llama").write().load::<f32>(Head::Lm).unwrap();
    for (key, value) in [
        ("partial_rotary_factor", json!(1.0)),
        ("no_rope_layers", json!([1, 1])),
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("sliding_window", json!(null)),
        ("logits_scaling", json!(1)),
        ("use_sliding_window", json!(false)),
        ("quantization_config", json!(null)),
        ("num_local_experts", json!(0)),
    ] {
        let mut folder = Folder::copy("neutral", "llama");
        folder.config[key] = value;
        let model = folder.write().load::<f32>(Head::Lm).unwrap();
        assert_eq!(model.spec(), plain.spec(), "{key}");
    }
}

#[test]
fn a_hostile_config_is_refused_before_memory_is_taken() {
    for line in HOSTILE.lines().filter(|l| !l.is_empty()) {
        let (case, want) = line.split_once(" -> ").unwrap();
        let [golden, key, value] = case.splitn(3, ' ').collect::<Vec<_>>()[..] else {
            panic!("{case}")
        };
        let mut folder = Folder::copy("hostile", golden);
        folder.config[key] = serde_json::from_str(value).unwrap();
        let got = folder.write().refused(Head::Lm);
        let got = got.strip_prefix("DIR/config.json: ").unwrap_or(&got);
        let families: Vec<_> = FAMILIES.iter().map(|f| f.model_type).collect();
        assert_eq!(got, want.replace("FAMILIES", &families.join(", ")), "{case}");
    }
    // a block less than stored: what is left over is named, whichever comes first
    let mut folder = Folder::copy("hostile", "gpt2");
    folder.config["n_layer"] = json!(1);
    let got = folder.write().refused(Head::Lm);
    assert!(got.starts_with("DIR/model.safetensors: `transformer.h.1."), "{got}");
    assert!(got.ends_with("` is no weight of a gpt2 model"), "{got}");
}

/// Any value under any key: a model, or an error that names the file.
#[test]
fn no_config_panics() {
    let values = r#"null true "x" [] {} -1 0 1 2.5 7 4096 16777216 9007199254740992
        18446744073709551615 1e300"#;
    let values: Vec<Value> =
        values.split_whitespace().map(|v| serde_json::from_str(v).unwrap()).collect();
    for name in &folders() {
        let folder = Folder::copy("any_config", name);
        folder.write();
        let keys: Vec<String> = folder.config.as_object().unwrap().keys().cloned().collect();
        for key in keys {
            for value in values.iter().map(Some).chain([None]) {
                let mut config = folder.config.clone();
                match value {
                    Some(value) => config[&key] = value.clone(),
                    None => drop(config.as_object_mut().unwrap().remove(&key)),
                }
                put(&folder.dir.join("config.json"), config.to_string());
                if let Err(error) = folder.load::<f32>(Head::Lm) {
                    assert!(matches!(error, Error::File { .. }), "{key} {value:?}: {error:?}");
                }
            }
        }
    }
}
