//! G12: a config that lies is a typed error that names file and key, before memory is taken on its
//! word. The largest sizes here would end the process.

use serde_json::{Value, json};
use warpo::{
    Error,
    models::{Config, FAMILIES, Head, Layout},
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
llama rope_scaling {"factor": 2, "rope_type": "linear"} -> `rope_scaling` is {"factor":2,"rope_type":"linear"}, wanted none beside `rope_parameters`
gpt_oss rope_parameters null -> `rope_scaling` is missing
gemma3 attn_logit_softcapping 50.0 -> `attn_logit_softcapping` = 50.0 is not supported, wanted null
qwen3_moe layer_types ["sliding_attention", "full_attention", "full_attention"] -> `layer_types` = ["sliding_attention","full_attention","full_attention"] is not supported, wanted full_attention for each layer
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

/// Configs as the hub has them, and how many weights those models are known to have.
#[test]
fn configs_of_the_hub_are_understood() {
    let llama = |more: Value| -> Value {
        let mut config = json!({
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "use_cache": true, "torch_dtype": "bfloat16"
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let llama3 = json!({
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"
    });
    let factors: Vec<f64> = (0..48).map(|i| 1.0 + f64::from(i) / 16.0).collect();
    for (name, config, want) in [
        (
            "Qwen2.5-0.5B",
            llama(json!({
                "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
                "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                "max_position_embeddings": 32768, "max_window_layers": 24, "sliding_window": 32768,
                "use_sliding_window": false, "use_mrope": false, "rope_theta": 1e6,
                "tie_word_embeddings": true, "vocab_size": 151936
            })),
            494_032_768,
        ),
        (
            "Qwen3-0.6B",
            llama(json!({
                "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
                "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
                "head_dim": 128, "max_position_embeddings": 40960, "max_window_layers": 28,
                "sliding_window": null, "use_sliding_window": false, "rope_theta": 1e6,
                "rope_scaling": null, "attention_bias": false, "tie_word_embeddings": true,
                "vocab_size": 151936
            })),
            596_049_920,
        ),
        (
            // Beside a part that sees, which is left out.
            "Qwen3.5-0.8B",
            json!({"model_type": "qwen3_5", "tie_word_embeddings": true, "vision_config": {}, "text_config":
            llama(json!({
                "model_type": "qwen3_5_text", "hidden_size": 1024, "intermediate_size": 3584,
                "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
                "head_dim": 256, "max_position_embeddings": 262144, "attn_output_gate": true,
                "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128, "linear_num_key_heads": 16,
                "linear_num_value_heads": 16, "linear_value_head_dim": 128,
                "mamba_ssm_dtype": "float32", "mlp_only_layers": [], "mtp_num_hidden_layers": 1,
                "rope_parameters": {
                    "mrope_interleaved": true, "mrope_section": [11, 11, 10],
                    "partial_rotary_factor": 0.25, "rope_theta": 1e7, "rope_type": "default"
                },
                "vocab_size": 248320
            }))}),
            752_393_024,
        ),
        (
            "LFM2-1.2B",
            llama(json!({
                "model_type": "lfm2", "hidden_size": 2048, "block_dim": 2048,
                "block_auto_adjust_ff_dim": true, "block_ff_dim": 12288,
                "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "conv_L_cache": 3,
                "conv_bias": false, "conv_dim": 2048, "full_attn_idxs": [2, 5, 8, 10, 12, 14],
                "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                "max_position_embeddings": 128000, "norm_eps": 1e-5, "rope_theta": 1e6,
                "vocab_size": 65536
            })),
            1_170_340_608,
        ),
        (
            "Llama-3.2-1B",
            llama(json!({
                "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
                "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                "head_dim": 64, "max_position_embeddings": 131072, "rope_theta": 500000.0,
                "rope_scaling": llama3, "attention_bias": false, "mlp_bias": false,
                "pretraining_tp": 1, "tie_word_embeddings": true, "vocab_size": 128256
            })),
            1_235_814_400,
        ),
        (
            "Mistral-7B-v0.1",
            llama(json!({
                "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                "max_position_embeddings": 32768, "sliding_window": 4096, "rope_theta": 10000.0,
                "tie_word_embeddings": false, "vocab_size": 32000
            })),
            7_241_732_096,
        ),
        (
            "gemma-2-2b",
            llama(json!({
                "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
                "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
                "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                "query_pre_attn_scalar": 256, "sliding_window": 4096,
                "max_position_embeddings": 8192, "rope_theta": 10000.0, "vocab_size": 256000
            })),
            2_614_341_888,
        ),
        (
            "gemma-3-1b",
            llama(json!({
                "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
                "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
                "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
                "attn_logit_softcapping": null, "final_logit_softcapping": null,
                "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6,
                "max_position_embeddings": 32768, "rope_local_base_freq": 10000,
                "rope_theta": 1000000, "rope_scaling": null, "vocab_size": 262144
            })),
            999_885_952,
        ),
        (
            "gemma-3-4b, its text part",
            json!({
                "model_type": "gemma3", "vision_config": {}, "mm_tokens_per_image": 256,
                "text_config": {
                    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                    "num_hidden_layers": 34, "sliding_window": 1024,
                    "rope_scaling": { "factor": 8.0, "rope_type": "linear" }
                }
            }),
            3_880_263_168,
        ),
        (
            "Phi-4-mini",
            llama(json!({
                "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
                "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
                "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
                "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "sliding_window": 262144,
                "rope_scaling": { "type": "longrope", "long_factor": factors, "short_factor": factors },
                "attention_bias": false, "tie_word_embeddings": true, "vocab_size": 200064
            })),
            3_836_021_760,
        ),
        (
            "pythia-160m",
            json!({
                "model_type": "gpt_neox", "hidden_size": 768, "intermediate_size": 3072,
                "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu",
                "max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000,
                "use_parallel_residual": true, "layer_norm_eps": 1e-5,
                "tie_word_embeddings": false, "vocab_size": 50304
            }),
            162_322_944,
        ),
        (
            "SmolLM3-3B",
            llama(json!({
                "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008,
                "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
                "max_position_embeddings": 65536, "no_rope_layer_interval": 4,
                "rope_theta": 5000000.0, "sliding_window": null, "use_sliding_window": false,
                "pretraining_tp": 2, "vocab_size": 128256
            })),
            3_075_098_624,
        ),
        (
            "OLMo-2-1124-7B",
            llama(json!({
                "model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
                "max_position_embeddings": 4096, "rope_theta": 500000, "rope_scaling": null,
                "attention_bias": false, "tie_word_embeddings": false, "vocab_size": 100352
            })),
            7_298_617_344,
        ),
        (
            "granite-3.1-2b",
            llama(json!({
                "model_type": "granite", "hidden_size": 2048, "intermediate_size": 8192,
                "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
                "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
                "logits_scaling": 8.0, "residual_multiplier": 0.22, "rope_theta": 5000000.0,
                "max_position_embeddings": 131072, "tie_word_embeddings": true, "vocab_size": 49155
            })),
            2_533_531_648,
        ),
    ] {
        let config = Config::parse(&config.to_string(), name).unwrap();
        let (_, spec) = config.spec().unwrap();
        let layout = Layout::new(&spec, Head::Lm);
        let got: usize = layout.tensors().iter().map(|t| t.len()).sum();
        assert_eq!(got, want, "{name}");
    }
}

/// What a family is where its config does not say: as transformers has it.
#[test]
fn families_have_their_own_defaults() {
    let spec = |golden: &str, edit: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut json = Config::read(&crate::support::golden::path(golden)).unwrap().json().clone();
        edit(&mut json);
        Config::parse(&Value::Object(json).to_string(), golden).unwrap().spec().unwrap().1
    };
    for (golden, eps) in [
        ("llama", 1e-6),
        ("olmo2", 1e-5),
        ("olmo3", 1e-5),
        ("phi3", 1e-5),
        ("ministral3", 1e-5),
        ("gpt_oss", 1e-5),
        ("qwen3", 1e-6),
        ("gemma3", 1e-6),
    ] {
        let spec = spec(golden, &|json| drop(json.remove("rms_norm_eps")));
        assert_eq!(spec.norm_eps, eps, "{golden}");
    }
    for (golden, theta) in
        [("llama", 1e4), ("olmo2", 1e4), ("olmo3", 5e5), ("smollm3", 2e6), ("gemma3", 1e6)]
    {
        let spec = spec(golden, &|json| drop(json.remove("rope_parameters")));
        assert_eq!(spec.ropes[0].theta, theta, "{golden}");
    }
    // Without `layer_types` the window is where SmolLM 3 does not rotate, and in all of Qwen3-MoE.
    let windowed = |golden: &str| {
        let spec = spec(golden, &|json| {
            json.remove("layer_types");
            json.insert("use_sliding_window".into(), json!(true));
            json.insert("sliding_window".into(), json!(4));
        });
        spec.each_layer().map(|l| l.attention.window.is_some()).collect::<Vec<_>>()
    };
    assert_eq!(windowed("smollm3"), [false, false, false, true]);
    let attends = |golden, key: &str, value: Value| {
        let spec = spec(golden, &|json| {
            json.remove("layer_types");
            json.insert(key.into(), value.clone());
        });
        (0..spec.layers).map(|l| spec.attends(l)).collect::<Vec<_>>()
    };
    assert_eq!(attends("qwen3_5", "num_hidden_layers", json!(4)), [false, false, false, true]);
    assert_eq!(attends("qwen3_5", "full_attention_interval", json!(2)), [false, true, false]);
    assert_eq!(attends("lfm2", "full_attn_idxs", json!([0, 2])), [true, false, true]);
    assert_eq!(attends("lfm2", "full_attn_idxs", json!(null)), [true; 3]);
    let wide = |edit: Value| {
        spec("lfm2", &|json| json.extend(edit.as_object().unwrap().clone())).mlp_hidden
    };
    let refused = |golden: &str, key: &str, value: Value| {
        let mut json = Config::read(&crate::support::golden::path(golden)).unwrap().json().clone();
        json.insert(key.into(), value);
        let config = Config::parse(&Value::Object(json).to_string(), golden).unwrap();
        crate::support::refusal(config.spec())
    };
    let e = refused("qwen3_5", "hidden_act", json!("gelu"));
    assert!(e.contains("`hidden_act` = \"gelu\" is not supported, wanted silu"), "{e}");
    let e = refused("qwen3_5", "attn_output_gate", json!(false));
    assert!(e.contains("`attn_output_gate`"), "{e}");
    let e = refused("lfm2", "theta", json!(5e5));
    assert!(e.contains("`theta` is 500000, wanted that of the rope, 1000000"), "{e}");
    assert_eq!(wide(json!({})), 24);
    assert_eq!(wide(json!({"block_auto_adjust_ff_dim": false})), 36);
    assert_eq!(wide(json!({"block_ffn_dim_multiplier": 1.4})), 40);
    assert_eq!(wide(json!({"block_ff_dim": 100, "block_multiple_of": 5})), 70);
    assert!(windowed("qwen3_moe").iter().all(|w| *w));
}
