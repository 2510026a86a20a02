//! Mixtures of experts as models: shards in bf16 and f16, what a step counts, and rows that choose
//! the same experts whenever they are computed.

use warpo::{
    device::Device,
    models::{
        self, Activations, Batch, Cache, Config, Head, Keep, Layout, LossColumns, Model, ParamKind,
        Pass, PassOptions, PassShape, Residency,
    },
    ops::routing,
};

use super::{
    golden::{forward, load, unpad},
    weights::{Folder, Tensor},
};
use crate::support::{
    assert_bits, assert_close, golden, golden::Golden, keep_all, params, pass_bytes, pass_room,
};

fn spec(name: &str) -> models::Spec {
    Config::read(&golden::path(name)).unwrap().spec().unwrap().1
}

/// Neighbouring tensors are in different files, in 16 bits that are read exactly.
#[test]
fn sharded_models_of_16_bits_load() {
    for name in ["qwen3_moe_bf16_sharded", "qwen3_moe_f16_sharded"] {
        let folder = format!("sharded/{name}");
        let g = Golden::open(&format!("{folder}/io.safetensors"));
        let rows = unpad(&g, "input_ids", "attention_mask");
        let path = golden::path(&folder);
        let model = Model::<f64>::load(&Device::cpu(), &path, Head::Lm, None).unwrap();
        let logits = forward(&model, &rows).logits;
        let (all, cols) = (g.get("logits_f64"), g.shape("input_ids")[1]);
        let row = |(b, r): (usize, &Vec<u32>)| all[b * cols * 90..][..r.len() * 90].to_vec();
        let truth: Vec<f64> = rows.iter().enumerate().flat_map(row).collect();
        assert_close(name, &logits, &truth, 1e-10, 1e-10);
    }
}

/// Matrices before the experts.
const MIXERS: [ParamKind; 4] =
    [ParamKind::Qkv, ParamKind::Out, ParamKind::MixerIn, ParamKind::MixerOut];

/// A token is multiplied by the experts that it chose and no others; all have their weights.
#[test]
fn a_mixture_counts_what_it_computes() {
    for (name, active) in [
        // Two blocks with experts: a router of 6 and 2 experts of 3 x 10 x 32, one of 3 x 24 x 32.
        ("qwen3_moe", 2 * (6 * 32 + 2 * 960) + 2304),
        ("gpt_oss", 2 * (4 * 32 + 2 * 3 * 16 * 32)),
        // Beside 2 experts of 3 x 10 x 32 one of 3 x 12 x 32.
        ("qwen3_next", 2 * (4 * 32 + 2 * 960 + 1152)),
    ] {
        let spec = spec(name);
        let layout = Layout::new(&spec, Head::Lm);
        let attention = |t: &&models::ParamTensor| MIXERS.contains(&t.kind);
        let rest: usize = layout.tensors().iter().filter(attention).map(|t| t.len()).sum();
        assert_eq!(layout.block_flops(), 2.0 * (active + rest) as f64, "{name}");
    }
    for name in ["qwen3_moe", "gpt_oss", "qwen3_next", "qwen2_moe"] {
        let (dev, path) = (Device::cpu(), golden::path(name));
        let model = Model::<f32>::load(&dev, &path, Head::Lm, None).unwrap();
        let planned = models::bytes::<f32>(&dev, model.spec(), Head::Lm, Residency::Frozen);
        let planned = planned.iter().find(|p| p.0 == "packed weights").unwrap().1;
        assert_eq!(model.panels().map(|(.., p)| 4 * p.len()).sum::<usize>(), planned, "{name}");
    }
    let layout = Layout::new(&spec("qwen3_moe"), Head::Lm);
    assert!(layout.find(ParamKind::ExpertsUp, Some(1)).is_none(), "block 1 has an MLP");
    let t = layout.find(ParamKind::ExpertsUp, Some(0)).unwrap();
    assert_eq!((t.stack, t.used, t.sides()), (6, 2, (20, 32)));
}

/// So Qwen 3.5 is released; transformers saves, and the golden folder has, a tensor an expert.
#[test]
fn experts_may_lie_in_one_tensor() {
    let (name, layers) = ("qwen3_5_moe", 2);
    let mut folder = Folder::copy("stacked_experts", name);
    for l in 0..layers {
        let at = format!("model.layers.{l}.mlp.experts");
        let of = |e: usize, part: &str| format!("{at}.{e}.{part}.weight");
        for (stack, parts, shape) in [
            ("gate_up_proj", &["gate_proj", "up_proj"][..], [4, 20, 32]),
            ("down_proj", &["down_proj"][..], [4, 32, 10]),
        ] {
            let each = (0..4).flat_map(|e| parts.iter().map(move |part| of(e, part)));
            let each: Vec<_> = each.filter_map(|name| folder.tensors.remove(&name)).collect();
            let numbers: Vec<f32> = each.iter().flat_map(|t| t.numbers()).collect();
            folder.tensors.insert(format!("{at}.{stack}"), Tensor::f32(&shape, &numbers));
        }
    }
    let (got, want) = (folder.write().load::<f32>(Head::Lm).unwrap(), load::<f32>(name, Head::Lm));
    assert_bits("weights", got.params().flat().host(), want.params().flat().host());

    let stack = "model.layers.1.mlp.experts.down_proj";
    let whole = folder.tensors.insert(stack.into(), Tensor::f32(&[1280], &[0.5; 1280])).unwrap();
    let e = folder.write().refused(Head::Lm);
    assert!(e.contains(&format!("`{stack}` has shape [1280], wanted [experts, out, in]")), "{e}");
    let few = Tensor::f32(&[3, 32, 10], &whole.numbers()[..960]);
    folder.tensors.insert(stack.into(), few);
    let e = folder.write().refused(Head::Lm);
    assert!(e.contains("`model.layers.1.mlp.experts.3.down_proj.weight` is missing"), "{e}");
    folder.tensors.insert(stack.into(), whole);
    folder.tensors.insert(format!("{stack}s"), Tensor::f32(&[1], &[0.5]));
    assert!(folder.write().refused(Head::Lm).contains("down_projs` is no weight"));
}

/// A pass takes memory for the pairs of its rows, not for all experts.
#[test]
fn a_pass_has_room_for_pairs() {
    let dev = Device::cpu();
    let bytes = |name: &str, rows| {
        let path = golden::path(name);
        let model = Model::<f32>::load(&dev, &path, Head::Lm, None).unwrap();
        pass_bytes(&dev, &model, PassShape::whole(rows, 1), keep_all(false))
    };
    let (small, large) = (bytes("gpt_oss", 1000), bytes("gpt_oss", 2000));
    assert!(large < 2 * small + (1 << 16), "{small} and {large}");
}

/// Logits of a row among others, alone, and in another order: the same experts, the same bits.
#[test]
fn rows_choose_the_same_experts_in_every_batch() {
    for name in ["qwen3_moe", "gpt_oss", "qwen3_next", "qwen2_moe"] {
        let path = golden::path(name);
        let model = Model::<f32>::load(&Device::cpu(), &path, Head::Lm, None).unwrap();
        let vocab = model.spec().vocab as u32;
        let id = |s: u32, t: u32| (5 * s + 3 * t + t * t) % vocab;
        let ids = |s: u32, n: u32| (0..n).map(|t| id(s, t)).collect::<Vec<_>>();
        let rows: Vec<Vec<u32>> = (0..6).map(|s| ids(s, 3 + 7 * s)).collect();
        let whole = forward(&model, &rows).logits;
        let mut at = 0;
        for row in &rows {
            let alone = forward(&model, std::slice::from_ref(row)).logits;
            assert_bits(name, &alone, &whole[at..at + alone.len()]);
            at += alone.len();
        }
        let mut batch = Batch::default();
        rows.iter().for_each(|r| batch.push_last(r));
        assert_eq!(batch.len() * vocab as usize, at);
    }
}

/// The gradient of the load-balance loss alone, through all that is before a router, by central
/// differences.
#[test]
fn the_loss_that_balances_experts_has_its_gradient() {
    for name in ["qwen3_moe", "gpt_oss", "qwen3_next", "qwen2_moe"] {
        let dev = Device::cpu();
        let path = golden::path(name);
        let mut model = Model::<f64>::load(&dev, &path, Head::Lm, None).unwrap();
        let mut batch = Batch::default();
        for n in [3, 9, 14] {
            let ids: Vec<u32> = (0..n).map(|t| (7 * n + t * t) % 89).collect();
            batch.push_predicted(&ids, 1);
        }
        let balanced = |model: &Model<f64>| -> f64 {
            let (spec, shape) = (model.spec(), batch.shape());
            let mut arena = pass_room(&dev, model, &batch, keep_all(false));
            let scope = arena.scope();
            let mut acts = Activations::new(&dev, &scope, spec, shape, Keep::All).unwrap();
            let staged = batch.stage(&dev, &scope, spec, shape.pages(&dev, spec)).unwrap();
            let mut cache = Cache::new(&dev, &scope, spec, shape).unwrap();
            model.forward(&dev, &staged.rows(), &mut acts, &mut cache).unwrap();
            let of = |l| {
                let mut column = vec![0.0; shape.rows];
                let routes = acts.routes(l)?;
                routing::balance(&dev, routes, (&mut column).into()).unwrap();
                Some(column.iter().sum::<f64>())
            };
            (0..spec.layers).filter_map(of).sum()
        };
        let mut grads = params(model.params().layout());
        for keep in [Keep::All, Keep::Streams] {
            grads.zero(&dev).unwrap();
            let options = PassOptions { keep, balance: 0.3, ..keep_all(false) };
            let mut arena = pass_room(&dev, &model, &batch, options);
            let scope = arena.scope();
            let none = |c: LossColumns<'_, f64>| {
                c.dy.host().fill(0.0);
                Ok(())
            };
            Pass::new(&dev, &model, &scope, &batch).train(&mut grads, options, none).unwrap();
            let flat = grads.flat().host().to_vec();
            let routers = model.params().layout().clone();
            let routers = routers.tensors().iter().filter(|t| t.kind == ParamKind::Router);
            // Some of each router, and of all weights.
            let mut at: Vec<usize> = routers.flat_map(|t| t.range().step_by(17)).collect();
            at.extend((0..flat.len()).step_by(997));
            for i in at {
                let mut shifted = |by: f64| {
                    model.params_mut().unwrap().flat_mut().host()[i] += by;
                    model.repack(&dev).unwrap();
                    let loss = 0.3 * balanced(&model);
                    model.params_mut().unwrap().flat_mut().host()[i] -= by;
                    loss
                };
                let slope = (shifted(1e-6) - shifted(-1e-6)) / 2e-6;
                let off = (flat[i] - slope).abs();
                assert!(off <= 1e-8 + 1e-5 * slope.abs(), "{name} {i}: {} for {slope}", flat[i]);
            }
            model.repack(&dev).unwrap();
            assert!(flat.iter().any(|d| d.abs() > 1e-4));
        }
    }
}

/// What is not computed is refused by name.
#[test]
fn keys_of_mixtures_are_computed_or_refused() {
    let of = |name: &str, key: &str, value: &str| {
        let text = std::fs::read_to_string(golden::path(name).join("config.json")).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json[key] = serde_json::from_str(value).unwrap();
        let config = Config::parse(&json.to_string(), "config.json").unwrap();
        config.spec().unwrap_err().to_string()
    };
    for (name, key, value, says) in [
        ("qwen3_moe", "output_router_logits", "true", "`output_router_logits`"),
        ("qwen3_moe", "num_experts_per_tok", "7", "`experts of a token` is 7, wanted a number"),
        ("qwen3_moe", "num_local_experts", "2000", "wanted a number from 1 to 1024"),
        ("qwen3_moe", "mlp_only_layers", "3", "`mlp_only_layers` is 3, wanted a list"),
        ("qwen3_next", "mlp_only_layers", "[1]", "wanted experts in every block"),
        ("qwen3_next", "decoder_sparse_step", "2", "wanted experts in every block"),
        ("qwen3_next", "num_experts", "0", "`number of experts` is 0, wanted a number from 1"),
        ("qwen3_5_moe", "norm_topk_prob", "false", "`norm_topk_prob` = false is not supported"),
        ("qwen2_moe", "use_sliding_window", "true", "`use_sliding_window` = true"),
        ("gpt_oss", "output_router_logits", "true", "`output_router_logits`"),
        ("gpt_oss", "swiglu_alpha", "1.5", "`swiglu_alpha` = 1.5 is not supported"),
        ("gpt_oss", "swiglu_limit", "0", "`swiglu_limit` is 0, wanted a number above 0"),
        (
            "gpt_oss",
            "quantization_config",
            "{\"quant_method\": \"mxfp4\"}",
            "`quantization_config`",
        ),
        ("llama", "num_local_experts", "8", "`num_local_experts` = 8 is not supported"),
    ] {
        let e = of(name, key, value);
        assert!(e.contains(says), "{name} {key}: {e}");
    }
}
