//! Low-rank adapters against PEFT in float64: logits, losses, gradients, updates, merged weights;
//! central differences; PEFT folders; a base that models share.

use half::bf16;
use warpo::{
    device::{Device, Element},
    models::{
        self, AdapterConfig, AdapterStart, Batch, Config, FactorSide, Head, Layout, LoadOptions,
        LoraOptions, LossColumns, Model, ParamKind, Params, Pass, Residency,
    },
    ops::{
        bradley_terry::{self, Pairs},
        grad_norm,
    },
    train::{
        Settings,
        models::{ROLES, TrainState},
    },
};

use super::golden::{assert_gradients, forward, named, sft, sft_batch, unpad};
use crate::support::{
    assert_bits, assert_close, golden, golden::Golden, host, keep_all, params, pass_room, randn,
    refusal, sim, wide,
};

/// Folders of adapters, and their bases.
const ADAPTERS: [(&str, &str); 6] = [
    ("lora_llama_all_r4", "llama"),
    ("lora_llama_qv_r4", "llama"),
    ("lora_llama_all_rslora", "llama"),
    ("lora_qwen2_all_r4", "qwen2"),
    ("lora_qwen2_qv_r4", "qwen2"),
    ("lora_qwen2_qv_rslora", "qwen2"),
];

fn config(name: &str, base: &str) -> Config {
    let adapter = AdapterConfig::read(&golden::path(name)).unwrap();
    Config::read(&golden::path(base)).unwrap().with_adapter(adapter).unwrap()
}

pub fn load<T: Element>(dev: &Device, (name, base): (&str, &str), head: Head) -> Model<T> {
    let options = LoadOptions { residency: Residency::Trained, ..LoadOptions::frozen(head) };
    models::load_as(dev, config(name, base), options).unwrap()
}

/// The base alone: no tensor of it is among the trained ones, nor has a gradient.
fn assert_only_adapters<T: Element>(model: &Model<T>) {
    let all = model.trained().tensors();
    assert!(all.iter().all(|t| t.factor.is_some() || t.kind == ParamKind::Score));
    assert!(all.iter().any(|t| t.factor.is_some()));
}

#[test]
fn logits_losses_and_gradients_of_adapters_are_those_of_peft() {
    for (name, base) in ADAPTERS {
        let g = Golden::open(&format!("{name}/lora.safetensors"));
        let mut model: Model<f64> = load(host(), (name, base), Head::Lm);
        assert_only_adapters(&model);
        let scale = model.spec().adapter.as_ref().unwrap().scale;
        assert_close(name, &[scale], &[g.scalar("scaling")], 0.0, 1e-15);
        let rows = unpad(&g, "input_ids", "attention_mask");
        let mask: Vec<bool> = g.ints("attention_mask").iter().map(|m| *m == 1).collect();
        let vocab = model.spec().vocab;
        let mask: Vec<bool> = mask.iter().flat_map(|m| vec![*m; vocab]).collect();
        let logits = forward(&model, &rows).logits;
        assert_close(name, &logits, &g.kept("logits_f64", &mask), 1e-11, 1e-10);
        let (grads, loss) = sft(&model, &g);
        assert_close("loss", &[loss], &[g.scalar("loss")], 1e-12, 1e-12);
        assert_gradients(&g, "grad/", (&model, &grads), (1e-11, 1e-9));
        let norm = grad_norm::norm(host(), grads.flat()).unwrap().get().unwrap();
        assert_close("norm", &[norm], &[g.scalar("grad_norm")], 0.0, 1e-10);

        let start: Model<f64> = load(host(), (name, base), Head::Lm);
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        let trained = ten_steps(&g, start, &mut norms, |model| {
            let (grads, loss) = sft(model, &g);
            losses.push(loss);
            grads
        });
        assert_close("losses", &losses, g.get("losses"), 1e-11, 1e-10);
        assert_close("norms", &norms, g.get("grad_norms"), 1e-11, 1e-9);
        let same = |m: &Model<f64>| m.params().flat().host().to_vec();
        assert_bits("the base", &same(&trained), &same(&model));

        let before = logits;
        model.merge(host()).unwrap();
        let merged = named(model.params(), &model);
        for key in g.keys("merged/") {
            let ours = &merged.iter().find(|(own, _)| *own == key).unwrap().1;
            assert_close(&key, ours, g.get(&format!("merged/{key}")), 1e-9, 6e-8);
        }
        assert!(model.adapter().is_none() && model.spec().adapter.is_none());
        let after = forward(&model, &rows).logits;
        assert_close("merged logits", &after, &before, 1e-11, 1e-10);
        assert!(after != before, "{name}: merged logits have other bits");
        g.all_read(&[]);
    }
}

/// AdamW as in the golden files, whose parameters after 1 and 10 steps are compared.
fn ten_steps(
    g: &Golden,
    model: Model<f64>,
    norms: &mut Vec<f64>,
    mut gradients: impl FnMut(&Model<f64>) -> Params<f64>,
) -> Model<f64> {
    let dev = host();
    let settings = Settings { beta2: 0.95, weight_decay: 0.01, ..Settings::default() };
    let role = ROLES.iter().find(|r| r.head == model.head() && r.trained.is_some()).unwrap();
    let len = model.trained().len();
    let mut state = TrainState::new(dev, role, model).unwrap();
    assert_eq!((state.m.flat().len(), state.v.flat().len()), (len, len));
    // A scalar head decays as the factors do.
    let decays = Settings { decay_all: true, ..settings };
    for step in 1..=10 {
        state.grads = gradients(&state.model);
        let norm = state.gradient_norm(dev).unwrap().get().unwrap();
        norms.push(norm);
        state.update(dev, &decays, 1e-3, norm).unwrap().get().unwrap();
        if step == 1 || step == 10 {
            let prefix = format!("params_after_{step}/");
            let own = state.model.adapter().unwrap();
            assert_gradients(g, &prefix, (&state.model, own), (1e-10, 1e-9));
        }
    }
    state.model
}

#[test]
fn a_reward_models_adapter_and_head_are_those_of_peft() {
    let name = "lora_llama_rm";
    let g = Golden::open(&format!("{name}/lora.safetensors"));
    let model: Model<f64> = load(host(), (name, "llama/rm"), Head::Scalar);
    assert_only_adapters(&model);
    let rows = unpad(&g, "input_ids", "attention_mask");
    let (n, mut batch) = (rows.len() / 2, Batch::default());
    // chosen and rejected side by side; the golden file has all chosen rows first
    let order: Vec<usize> = (0..n).flat_map(|i| [i, n + i]).collect();
    order.iter().for_each(|i| batch.push_last(&rows[*i]));
    let want: Vec<f64> = order.iter().map(|i| g.get("scores")[*i]).collect();
    let mut first = true;
    let learn = |model: &Model<f64>, losses: &mut Vec<f64>, first: &mut bool| {
        let mut grads = params(model.trained());
        let mut arena = pass_room(host(), model, &batch, keep_all(false));
        let scope = arena.scope();
        Pass::new(host(), model, &scope, &batch)
            .train(&mut grads, keep_all(false), |LossColumns { y, mut dy, .. }| {
                if std::mem::take(first) {
                    assert_close(name, y.host(), &want, 1e-11, 1e-10);
                }
                let t = Pairs { scores: y, margins: [][..].into(), weights: None };
                let s = bradley_terry::forward(host(), dy.reborrow(), t, 0.0, n as f64)?.get()?;
                losses.push(s.loss);
                Ok(())
            })
            .unwrap();
        grads
    };
    let mut losses = Vec::new();
    let grads = learn(&model, &mut losses, &mut first);
    assert_close("loss", &losses, &[g.scalar("loss")], 1e-12, 1e-12);
    assert_gradients(&g, "grad/", (&model, &grads), (1e-11, 1e-9));
    losses.clear();
    let scale = model.spec().adapter.as_ref().unwrap().scale;
    assert_eq!(scale, g.scalar("scaling"));
    ten_steps(&g, model, &mut Vec::new(), |model| learn(model, &mut losses, &mut first));
    assert_close("losses", &losses, g.get("losses"), 1e-11, 1e-10);
    g.all_read(&[]);
}

const TINY: &str = r#"{"model_type": "llama", "vocab_size": 29, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    "intermediate_size": 27, "max_position_embeddings": 128, "attention_bias": true,
    "mlp_bias": true}"#;

fn lora(targets: &[&str]) -> LoraOptions {
    let targets = targets.iter().map(|name| (*name).to_owned()).collect();
    LoraOptions { rank: 3, alpha: 5.0, rslora: false, targets }
}

fn adapted(json: &str, targets: &[&str]) -> warpo::Result<Config> {
    let adapter = AdapterConfig::new(lora(targets), "base".as_ref(), 7)?;
    Config::parse(json, "config.json").unwrap().with_adapter(adapter)
}

/// A model whose base and adapter are drawn from N(0, 0.3²), norms around 1.
fn drawn(targets: &[&str], head: Head) -> Model<f64> {
    let config = adapted(TINY, targets).unwrap();
    let mut base: Model<f64> =
        Model::zeros(host(), config.base(), head, Residency::Frozen).unwrap();
    let fill = |model: &mut Model<f64>, layout: &Layout| {
        for t in layout.tensors() {
            let norm = matches!(t.kind, ParamKind::Norm1 | ParamKind::Norm2 | ParamKind::FinalNorm);
            let centre = if norm { 1.0 } else { 0.0 };
            let draws: Vec<f64> = randn(&t.name(), t.len());
            let to = model.params_mut().unwrap().tensor_mut(t).host();
            to.iter_mut().zip(draws).for_each(|(w, x)| *w = centre + 0.3 * x);
        }
        model.repack(host()).unwrap();
    };
    let layout = base.params().layout().clone();
    fill(&mut base, &layout);
    let mut model = base.over(host(), config, head, Residency::Frozen).unwrap();
    let layout = model.trained().clone();
    fill(&mut model, &layout);
    model
}

/// |a - n| <= 1e-8 + 1e-5 |n| in every weight of an adapter, of all layers and of some.
#[test]
fn gradients_of_adapters_are_central_differences() {
    for (targets, head) in
        [(&["all-linear"][..], Head::Lm), (&["v_proj", "layers.1.mlp.up_proj"], Head::Scalar)]
    {
        let mut model = drawn(targets, head);
        let mut batch = Batch::default();
        for (s, n) in [7usize, 3, 5].into_iter().enumerate() {
            let ids: Vec<u32> = (0..n).map(|t| ((7 * s + 11 * t + t * t) % 29) as u32).collect();
            batch.push_predicted(&ids, 1);
        }
        let dy: Vec<f64> = randn("dy", batch.selected().len());
        let pass = |model: &Model<f64>, grads: &mut Params<f64>| {
            let mut arena = pass_room(host(), model, &batch, keep_all(false));
            let (scope, mut loss) = (arena.scope(), 0.0);
            Pass::new(host(), model, &scope, &batch)
                .train(grads, keep_all(false), |c| {
                    loss = c.y.host().iter().zip(&dy).map(|(y, d)| y * d).sum();
                    c.dy.host().copy_from_slice(&dy);
                    Ok(())
                })
                .unwrap();
            loss
        };
        let layout = model.trained().clone();
        let mut grads = params::<f64>(&layout);
        pass(&model, &mut grads);
        for t in layout.tensors() {
            let mut largest = 0.0f64;
            for i in t.range() {
                let at = model.adapter().unwrap().flat().host()[i];
                let mut loss_at = |x: f64| {
                    model.params_mut().unwrap().flat_mut().host()[i] = x;
                    model.repack(host()).unwrap();
                    pass(&model, &mut params(&layout))
                };
                let n = (loss_at(at + 6e-6) - loss_at(at - 6e-6)) / 1.2e-5;
                loss_at(at);
                let a = grads.flat().host()[i];
                let e = (a - n).abs();
                assert!(e <= 1e-8 + 1e-5 * n.abs(), "{}: {a:e} for {n:e}", t.name());
                largest = largest.max(a.abs());
            }
            assert!(largest > 1e-6, "{} is not trained", t.name());
        }
    }
}

/// A new adapter changes no bit; its A is uniform in ±1/sqrt(inputs), one draw for each number.
#[test]
fn a_new_adapter_starts_as_pefts() {
    let options = LoraOptions { rank: 8, ..lora(&["all-linear"]) };
    let adapter = AdapterConfig::new(options, &golden::path("llama"), 3).unwrap();
    let config = Config::read(&golden::path("llama")).unwrap();
    let base: Model<f32> =
        models::load(host(), config.dir(), LoadOptions::frozen(Head::Lm)).unwrap();
    let config = config.with_adapter(adapter).unwrap();
    let model = base.adapted(host(), config.clone(), Head::Lm, Residency::Trained).unwrap();
    assert!(model.shares_base(&base));
    let rows = [vec![3, 1, 4, 1, 5], vec![9, 2, 6]];
    let plain = forward(&base, &rows).logits;
    assert_bits("logits", &forward(&model, &rows).logits, &plain);
    let mut seen = std::collections::BTreeSet::new();
    for t in model.trained().tensors() {
        let own = model.adapter().unwrap().tensor(t).host();
        if t.factor.unwrap().side == FactorSide::B {
            assert!(own.iter().all(|x| *x == 0.0), "{}", t.name());
            continue;
        }
        let bound = 1.0 / (t.cols as f32).sqrt();
        assert!(own.iter().all(|x| x.abs() <= bound), "{}", t.name());
        let mean = own.iter().sum::<f32>() / own.len() as f32;
        let square = own.iter().map(|x| x * x).sum::<f32>() / own.len() as f32;
        assert!(mean.abs() < 0.1 * bound, "{}: mean {mean}", t.name());
        assert!((square * 3.0 / bound / bound - 1.0).abs() < 0.2, "{}: {square}", t.name());
        assert!(seen.insert(own[..4].iter().map(|x| x.to_bits()).collect::<Vec<_>>()));
    }
    let again = base.adapted(host(), config, Head::Lm, Residency::Trained).unwrap();
    let own = |m: &Model<f32>| m.adapter().unwrap().flat().host().to_vec();
    assert_bits("the same seed", &own(&again), &own(&model));
    let name = refusal(model.over(host(), model.config().clone(), Head::Lm, Residency::Frozen));
    assert!(name.contains("a base"), "{name}");
    let mut base = base;
    assert!(refusal(base.params_mut()).contains("shared"), "models share it");
}

/// Loss and gradients of bf16 on a device are those of f64, and zeros beside the factors stay 0.
#[test]
fn adapters_learn_on_a_device_what_they_learn_in_f64() {
    sim::on_devices(|dev| {
        for (name, base) in ADAPTERS {
            let g = Golden::open(&format!("{name}/lora.safetensors"));
            let model: Model<bf16> = load(dev, (name, base), Head::Lm);
            let batch = sft_batch(&g);
            let mut grads = Params::zeros(dev, "gradients", model.trained()).unwrap();
            let mut arena = pass_room(dev, &model, &batch, keep_all(false));
            let (scope, mut loss) = (arena.scope(), 0.0);
            Pass::new(dev, &model, &scope, &batch)
                .train(&mut grads, keep_all(false), |c| {
                    let logp = dev.read(c.y)?;
                    let n = logp.len();
                    loss = -logp.iter().map(|x| f64::from(*x)).sum::<f64>() / n as f64;
                    dev.write(c.dy, &vec![-1.0 / n as f32; n])
                })
                .unwrap();
            let truth = g.scalar("loss");
            assert!((loss - truth).abs() < truth / 256.0, "{name}: {loss} for {truth}");
            let (mut off, mut all, mut inside) = (0.0, 0.0, 0.0);
            for (key, _, ours) in models::named(dev, &model, &grads).unwrap() {
                for (a, t) in wide(&ours).iter().zip(g.get(&format!("grad/{key}"))) {
                    off += (a - t).powi(2);
                    all += t * t;
                    inside += a.abs();
                }
            }
            let error = (off / all).sqrt();
            println!("{name}: gradient off by {error:.1e}");
            assert!(error < 0.05, "{name}: the gradient is off by {error}");
            let flat = dev.read(grads.flat()).unwrap();
            let whole: f64 = flat.iter().map(|x| f64::from(x.abs())).sum();
            assert!((inside - whole).abs() <= 1e-9 * whole, "{name}: {inside} of {whole}");
        }
    });
}

/// What is written is what was read, bit for bit, under PEFT's names.
#[test]
fn pefts_files_come_back_as_they_were() {
    for (name, base) in ADAPTERS.into_iter().chain([("lora_llama_rm", "llama/rm")]) {
        let head = if base.ends_with("rm") { Head::Scalar } else { Head::Lm };
        let model: Model<f32> = load(host(), (name, base), head);
        let mut bytes = Vec::new();
        models::write_weights(host(), &model, safetensors::Dtype::F32, &mut |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })
        .unwrap();
        let was = std::fs::read(golden::path(name).join(models::ADAPTER_FILE)).unwrap();
        let (was, is) = (
            safetensors::SafeTensors::deserialize(&was).unwrap(),
            safetensors::SafeTensors::deserialize(&bytes).unwrap(),
        );
        assert_eq!(was.len(), is.len(), "{name}");
        for (key, view) in was.tensors() {
            let own = is.tensor(&key).unwrap();
            assert_eq!(own.shape(), view.shape(), "{name}: {key}");
            assert!(own.data() == view.data(), "{name}: {key}");
        }
        let text = models::adapter_config_text(&model, &golden::path(base)).unwrap();
        let again = AdapterConfig::parse(&text, "x", AdapterStart::Seed(0)).unwrap();
        assert_eq!(again.options(), model.config().adapter().unwrap().options());
    }
}

/// Names are those of modules or their ends; what cannot be adapted is refused by its name.
#[test]
fn targets_that_cannot_be_are_named() {
    let spec =
        |targets: &[&str]| Ok(adapted(TINY, targets)?.spec()?.1.adapter.unwrap().sites.len());
    assert_eq!(spec(&["all-linear"]).unwrap(), 14);
    assert_eq!(spec(&["q_proj", "self_attn.v_proj"]).unwrap(), 4);
    assert_eq!(spec(&["model.layers.1.mlp.down_proj"]).unwrap(), 1);
    for (targets, says) in [
        (&["embed_tokens"][..], "none of `model.embed_tokens`"),
        (&["input_layernorm"], "none of `model.layers.0.input_layernorm`"),
        (&["proj"], "there is no `proj` here"),
        (&["q_proj", "lm_head"], "there is no `lm_head` here"),
        (&["q_proj", "all-linear"], "all-linear alone"),
        (&[], "a list of names"),
    ] {
        let said = refusal(spec(targets));
        assert!(said.contains(says), "{said}");
    }
}

/// A key of adapter_config.json that changes results is computed or refused by its name.
#[test]
fn keys_that_are_not_computed_are_named() {
    let path = golden::path("lora_llama_qv_r4").join(models::ADAPTER_CONFIG);
    let text = std::fs::read_to_string(path).unwrap();
    let with = |key: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json[key] = value;
        let adapter = AdapterConfig::parse(&json.to_string(), "x", AdapterStart::Seed(0))?;
        Config::parse(TINY, "config.json").unwrap().with_adapter(adapter)?.spec()
    };
    use serde_json::json;
    for (key, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("layers_to_transform", json!([0])),
        ("rank_pattern", json!({"q_proj": 2})),
        ("alpha_pattern", json!({"q_proj": 2})),
        ("lora_bias", json!(true)),
        ("peft_type", json!("IA3")),
        ("peft_type", json!(null)),
        ("init_lora_weights", json!("pissa")),
        ("modules_to_save", json!(["lm_head"])),
        ("modules_to_save", json!(["embed_tokens"])),
        ("exclude_modules", json!(["k_proj"])),
        ("trainable_token_indices", json!([1])),
        ("target_parameters", json!(["x"])),
        ("target_modules", json!(".*proj")),
        ("task_type", json!("SEQ_2_SEQ_LM")),
        ("what_comes_next", json!(1)),
        ("r", json!(0)),
        ("lora_alpha", json!("x")),
        ("use_rslora", json!(1)),
    ] {
        let said = refusal(with(key, value));
        assert!(said.contains(&format!("`{key}`")), "{key}: {said}");
    }
    for (key, value) in [
        ("init_lora_weights", json!("gaussian")),
        ("fan_in_fan_out", json!(true)),
        ("lora_dropout", json!(0.1)),
        ("revision", json!("main")),
        ("what_comes_next", json!(null)),
        ("what_comes_next", json!(false)),
    ] {
        with(key, value).unwrap();
    }
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["lora_dropout"] = json!(0.1);
    let start = AdapterStart::Folder(golden::path("lora_llama_qv_r4"));
    let adapter = AdapterConfig::parse(&json.to_string(), "x", start).unwrap();
    let config = Config::read(&golden::path("llama")).unwrap().with_adapter(adapter).unwrap();
    let load = |residency, head| {
        let options = LoadOptions { residency, new_head: Some(0), ..LoadOptions::frozen(head) };
        models::load_as::<f32>(host(), config.clone(), options)
    };
    load(Residency::Frozen, Head::Lm).unwrap();
    let said = refusal(load(Residency::Trained, Head::Lm));
    assert!(said.contains("`lora_dropout` = 0.1 is not supported, wanted 0 to train it"), "{said}");
    assert!(refusal(load(Residency::Frozen, Head::Scalar)).contains("`task_type`"));
}
