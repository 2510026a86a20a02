//! Whole models against Hugging Face and TRL in float64: logits, log-probs, entropy, hidden states,
//! greedy tokens; losses and gradients of SFT, reward modelling and PPO.
//!
//! No golden tensor is skipped silently: each test ends by naming what it leaves to others.

use warpo::{
    device::{Device, Float},
    models::{
        self, Activations, Batch, BatchRows, Cache, Config, FAMILIES, Head, Keep, LoadOptions,
        LossColumns, Model, ParamKind, Params, Pass, PassShape, Scales,
    },
    ops::{
        bradley_terry::{self, Pairs},
        grad_norm, matmul, sample, scale,
    },
    rng::{Purpose, Stream},
    rollout::{GenerationConfig, Generator, Prompt},
};

use crate::support::{
    PARAMS, assert_bits, assert_close, assert_earned, golden, golden::Golden, host, keep_all,
    params, pass_room, room, temp_dir, wide,
};

/// Those of Hugging Face and TRL together.
pub const MODELS: [&str; 3] = ["gpt2", "llama", "llama_tied"];

/// All folders of a model with its outputs.
pub fn folders() -> Vec<String> {
    let all = std::fs::read_dir(golden::path("")).unwrap().map(|f| f.unwrap());
    let mut all: Vec<_> = all.map(|f| f.file_name().into_string().unwrap()).collect();
    all.retain(|name| golden::path(name).join("io.safetensors").exists());
    all.sort();
    all
}

pub fn load<F: Float>(name: &str, head: Head) -> Model<F> {
    Model::load(&Device::cpu(), &golden::path(name), head, Some(0)).unwrap()
}

/// The same for these sequences, of which the longest chooses some rotary positions: Hugging Face
/// looks at each batch.
pub fn load_for<F: Float>(name: &str, head: Head, rows: &[Vec<u32>]) -> Model<F> {
    let longest = rows.iter().map(Vec::len).max();
    let options = LoadOptions { longest, ..LoadOptions::frozen(head) };
    models::load(&Device::cpu(), &golden::path(name), options).unwrap()
}

/// All tensors but these were read. Some folders have neither logits nor entropy on the left.
#[track_caller]
fn all_read(g: &Golden, except: [&str; 5]) {
    let sparse = |key: &str| ["left/logits", "left/entropy"].contains(&key);
    let there = |key: &&str| !sparse(key) || g.has(&format!("{key}_f64"));
    let mut except: Vec<_> = except.into_iter().filter(there).collect();
    // What Hugging Face makes without a cache where its cache is another model.
    except.extend(g.has("greedy_nocache/sequences").then_some("greedy_nocache"));
    g.all_read(&except);
}

/// A family that is not here has no oracle.
#[test]
fn every_family_has_a_folder() {
    let of = |name: &String| Config::read(&golden::path(name)).unwrap().spec().unwrap().0;
    let mut seen: Vec<_> = folders().iter().map(|name| of(name).model_type).collect();
    seen.sort();
    seen.dedup();
    let mut all: Vec<_> = FAMILIES.iter().map(|f| f.model_type).collect();
    all.sort();
    assert_eq!(seen, all);
}

/// Tolerance of gradients and weights: but for SFT most are rounded to f32.
pub fn stored(name: &str) -> (f64, f64) {
    let rounding =
        if ["gpt2", "llama"].contains(&name) { 0.0 } else { f64::from(f32::EPSILON) / 2.0 };
    (1e-11, 1e-9 + rounding)
}

/// Hugging Face turns the positions of a sequence anew as it grows.
fn is_chosen_by_length(name: &str) -> bool {
    name.ends_with("_dynamic") || name.ends_with("_longrope")
}

/// Each row is a family, each "yes" an oracle in its folders that the test of the column reads.
#[test]
fn readme_has_the_table_of_families() {
    let readme = std::fs::read_to_string(crate::support::root().join("README.md")).unwrap();
    let of = |name: &String| Config::read(&golden::path(name)).unwrap().spec().unwrap().0;
    for family in FAMILIES {
        let mut all = folders();
        all.retain(|name| of(name).model_type == family.model_type);
        let some =
            |holds: &dyn Fn(&String) -> bool| if all.iter().any(holds) { "yes" } else { "no" };
        let has = |file: &'static str| move |name: &String| golden::path(name).join(file).exists();
        let row = [
            some(&has("io.safetensors")),
            some(&has("sft.safetensors")),
            some(&|name| !is_chosen_by_length(name)),
            some(&has("rm.safetensors")),
            some(&|_| true),
            some(&|name| on_device().any(|n| n == *name)),
        ];
        let line = format!("| `{}` | {} |", family.model_type, row.join(" | "));
        println!("{line}");
        assert!(readme.contains(&line), "README.md has no line {line}");
    }
}

/// Folders of models that a CUDA device takes: it wants widths of whole packets.
pub fn on_device() -> impl Iterator<Item = String> {
    folders().into_iter().filter(|name| name != "llama_tied")
}

/// Rows of a padded batch, without the padding.
pub fn unpad(g: &Golden, ids: &str, mask: &str) -> Vec<Vec<u32>> {
    let cols = g.shape(ids)[1];
    let (ids, mask) = (g.ints(ids), g.ints(mask));
    ids.chunks(cols)
        .zip(mask.chunks(cols))
        .map(|(i, m)| i.iter().zip(m).filter(|x| *x.1 == 1).map(|x| *x.0 as u32).collect())
        .collect()
}

pub struct Outputs<F> {
    pub logits: Vec<F>,
    streams: Vec<Vec<F>>,
    pub hidden: Vec<F>,
}

/// What the head reads at every position of every sequence, packed.
fn hidden<F: Float>(model: &Model<F>, rows: &[Vec<u32>]) -> Vec<F> {
    forward(model, rows).hidden
}

/// Logits at every position of every sequence, packed; none for a scalar head.
pub fn forward<F: Float>(model: &Model<F>, rows: &[Vec<u32>]) -> Outputs<F> {
    let dev = Device::cpu();
    let mut batch = Batch::default();
    rows.iter().for_each(|r| batch.push_last(r));
    let n = batch.len();
    let spec = model.spec();
    let mut arena = room(1 << 23);
    let scope = arena.scope();
    let shape = PassShape::whole(n, rows.len());
    let mut acts = Activations::new(&dev, &scope, spec, shape, Keep::All).unwrap();
    let staged = batch.stage(&dev, &scope, spec, shape.pages(&dev, spec)).unwrap();
    let mut cache = Cache::new(&dev, &scope, spec, shape).unwrap();
    let all: Vec<u32> = (0..n as u32).collect();
    let rows = BatchRows { selected: (&all).into(), ..staged.rows() };
    model.forward(&dev, &rows, &mut acts, &mut cache).unwrap();
    let mut logits = Vec::new();
    if let Ok(head) = model.lm_head(host()) {
        logits.resize(n * spec.vocab, F::ZERO);
        matmul::forward(&dev, (&mut logits).into(), acts.hidden(), head.packed, None, None)
            .unwrap();
        let Scales { logits: divisor, logit_cap, .. } = spec.scales;
        scale::in_place(&dev, (&mut logits).into(), 1.0 / divisor, logit_cap).unwrap();
    }
    let streams = (0..spec.layers).map(|l| acts.stream(l).unwrap().host().to_vec()).collect();
    Outputs { logits, streams, hidden: acts.hidden().host().to_vec() }
}

/// The real positions of a padded `[rows, cols, width]` golden tensor.
fn real(g: &Golden, key: &str, mask: &str) -> Vec<f64> {
    let x = g.get(key);
    let mask = g.ints(mask);
    let width = x.len() / mask.len();
    let rows = x.chunks(width).zip(mask).filter(|r| r.1 == 1);
    rows.flat_map(|r| r.0.to_vec()).collect()
}

#[test]
fn logits_and_hidden_states_are_those_of_hugging_face() {
    for name in &folders() {
        let g = Golden::open(&format!("{name}/io.safetensors"));
        let rows = unpad(&g, "right/input_ids", "right/attention_mask");
        let mask = "right/attention_mask";
        let truth = real(&g, "right/logits_f64", mask);
        let pass = forward::<f64>(&load_for(name, Head::Lm, &rows), &rows);
        assert_close(name, &pass.logits, &truth, 1e-10, 1e-10);
        for (l, x) in pass.streams.iter().enumerate() {
            let want = real(&g, &format!("right/hidden_states/{l}"), mask);
            let (abs, rel) = stored(name);
            assert_close(&format!("{name} stream {l}"), x, &want, 10.0 * abs, rel);
        }
        let last = format!("right/hidden_states/{}", pass.streams.len());
        let (abs, rel) = stored(name);
        assert_close(name, &pass.hidden, &real(&g, &last, mask), 10.0 * abs, rel);

        // f32: at most twice as far from the truth as Hugging Face's own f32
        let plain =
            real(&g, "right/logits_f32", mask).iter().map(|x| *x as f32).collect::<Vec<_>>();
        let ours = forward::<f32>(&load_for(name, Head::Lm, &rows), &rows).logits;
        assert_earned(name, &ours, &plain, &truth);

        // padded on the left: the same sequences at the same positions
        let mask = "left/attention_mask";
        assert_eq!(unpad(&g, "left/input_ids", mask), rows);
        let positions: Vec<f64> =
            rows.iter().flat_map(|r| (0..r.len()).map(|p| p as f64)).collect();
        assert_eq!(real(&g, "left/position_ids", mask), positions);
        if g.has("left/logits_f64") {
            assert_close(name, &pass.logits, &real(&g, "left/logits_f64", mask), 1e-10, 1e-10);
        }
        all_read(
            &g,
            ["right/logprobs", "right/entropy", "left/logprobs", "left/entropy", "greedy/"],
        );
    }
}

/// The names that the hub has for GPT-2: no prefix, and mask buffers that are no weights.
#[test]
fn the_hubs_names_of_gpt2_are_read() {
    let (ours, hub) = (load::<f32>("gpt2", Head::Lm), load::<f32>("gpt2_hubnames", Head::Lm));
    assert_bits("weights", hub.params().flat().host(), ours.params().flat().host());
    let g = Golden::open("gpt2/io.safetensors");
    let mask = "right/attention_mask";
    let rows = unpad(&g, "right/input_ids", mask);
    let logits = forward::<f64>(&load("gpt2_hubnames", Head::Lm), &rows).logits;
    assert_close("logits", &logits, &real(&g, "right/logits_f64", mask), 1e-10, 1e-10);
}

/// `config.v4.json` is the same model in the spelling of transformers 4.
#[test]
fn both_spellings_of_a_config_are_one_model() {
    let dir = temp_dir("config_v4");
    for name in folders() {
        for (folder, head) in [(name.to_owned(), Head::Lm), (format!("{name}/rm"), Head::Scalar)] {
            let from = golden::path(&folder);
            if !from.exists() {
                continue;
            }
            let text = std::fs::read_to_string(from.join("config.v4.json")).unwrap();
            let v4 = Config::parse(&text, "config.v4.json").unwrap();
            let new = Config::read(&from).unwrap();
            assert_ne!(v4.json(), new.json(), "{folder}");
            assert_eq!(v4.spec().unwrap().1, new.spec().unwrap().1, "{folder}");

            std::fs::write(dir.join("config.json"), text).unwrap();
            let weights = "model.safetensors";
            std::fs::copy(from.join(weights), dir.join(weights)).unwrap();
            let old = Model::<f32>::load(&Device::cpu(), &dir, head, Some(0)).unwrap();
            let ids = [vec![5, 7, 11, 13, 17, 19, 23]];
            let (a, b) = (hidden(&old, &ids), hidden(&load(&folder, head), &ids));
            assert_bits(&folder, &a, &b);
        }
    }
}

/// Log-probs and entropy of the padded batch, computed without padding.
#[test]
fn logprobs_and_entropy_are_those_of_hugging_face() {
    for name in &folders() {
        let g = Golden::open(&format!("{name}/io.safetensors"));
        let rows = unpad(&g, "right/input_ids", "right/attention_mask");
        let model = load_for::<f64>(name, Head::Lm, &rows);
        for side in ["right", "left"] {
            let rows = unpad(&g, &format!("{side}/input_ids"), &format!("{side}/attention_mask"));
            let mut batch = Batch::default();
            rows.iter().for_each(|r| batch.push_predicted(r, 1));
            let (logp, entropy) = policy(&model, &batch, &mut params(model.params().layout()));
            // Golden rows: [b, t] is the log-prob of token t + 1, 0 where either is padding.
            let mask = g.ints(&format!("{side}/attention_mask"));
            let cols = g.shape(&format!("{side}/attention_mask"))[1];
            let want = g.get(&format!("{side}/logprobs_f64"));
            let h = format!("{side}/entropy_f64");
            let both = |b: usize, t: usize| mask[b * cols + t] == 1 && mask[b * cols + t + 1] == 1;
            let at: Vec<(usize, usize)> = (0..rows.len())
                .flat_map(|b| (0..cols - 1).map(move |t| (b, t)))
                .filter(|(b, t)| both(*b, *t))
                .collect();
            let want: Vec<f64> = at.iter().map(|(b, t)| want[b * (cols - 1) + t]).collect();
            assert_close(&format!("{name} {side} logp"), &logp, &want, 1e-11, 1e-10);
            if g.has(&h) {
                let h = g.get(&h);
                let h: Vec<f64> = at.iter().map(|(b, t)| h[b * cols + t]).collect();
                assert_close(&format!("{name} {side} entropy"), &entropy, &h, 1e-10, 1e-10);
            }
        }
        all_read(&g, ["right/logits", "right/hidden", "left/logits", "left/position", "greedy/"]);
    }
}

/// Runs a policy pass with gradient 0.
fn policy<F: Float>(model: &Model<F>, batch: &Batch, grads: &mut Params<F>) -> (Vec<F>, Vec<F>) {
    let mut arena = pass_room(host(), model, batch, keep_all(true));
    let (mut logp, mut entropy) = (Vec::new(), Vec::new());
    let (dev, scope) = (Device::cpu(), arena.scope());
    Pass::new(&dev, model, &scope, batch)
        .train(grads, keep_all(true), |c| {
            logp = c.y.host().to_vec();
            entropy = c.entropy.unwrap().host().to_vec();
            c.dy.host().fill(F::ZERO);
            c.dentropy.unwrap().host().fill(F::ZERO);
            Ok(())
        })
        .unwrap();
    (logp, entropy)
}

#[test]
fn greedy_tokens_are_those_of_hugging_face() {
    let all = folders().into_iter().filter(|name| !is_chosen_by_length(name));
    for name in &all.collect::<Vec<_>>() {
        let g = Golden::open(&format!("{name}/io.safetensors"));
        let model = load::<f32>(name, Head::Lm);
        let prompts: Vec<Prompt> = unpad(&g, "left/input_ids", "left/attention_mask")
            .into_iter()
            .enumerate()
            .map(|(i, ids)| Prompt { sample: i as u64, ids })
            .collect();
        let json = |file: &str| {
            let text = std::fs::read_to_string(golden::path(name).join(file)).ok()?;
            let eos = &serde_json::from_str::<serde_json::Value>(&text).unwrap()["eos_token_id"];
            let all = eos.as_array().cloned().unwrap_or(vec![eos.clone()]);
            Some(all.iter().map(|id| id.as_u64().unwrap() as u32).collect())
        };
        let stop_ids = json("generation_config.json").or_else(|| json("config.json")).unwrap();
        let settings = GenerationConfig {
            sampling: sample::SamplingParams::greedy(),
            max_new_tokens: 64,
            stop_ids,
            stream: Stream { seed: 0, step: 0, purpose: Purpose::Sample },
        };
        let generator = Generator::for_prompts(&prompts, 64, 3, 16);
        let mut arena = room(generator.plan::<f32>(host(), model.spec(), &PARAMS).unwrap());
        let dev = Device::cpu();
        let out = generator.run(&dev, &model, &arena.scope(), &prompts, &settings, |_| Ok(()));
        let out = out.unwrap();
        let cols = g.shape("greedy/sequences")[1];
        let start = g.shape("left/input_ids")[1];
        for ((b, n), done) in g.ints("greedy/new_tokens").iter().enumerate().zip(&out) {
            let row = &g.ints("greedy/sequences")[b * cols..][..cols];
            let want: Vec<u32> =
                row[start..start + *n as usize].iter().map(|x| *x as u32).collect();
            assert_eq!(done.ids, want, "{name} row {b}");
        }
        all_read(&g, ["right/", "left/logits", "left/logprobs", "left/entropy", "left/position"]);
    }
}

/// Names of the fixtures' parameters, and where they are in our layout.
pub fn named<F: Float>(params: &Params<F>, model: &Model<F>) -> Vec<(String, Vec<f64>)> {
    let all = warpo::models::named(host(), model, params).unwrap();
    all.into_iter().map(|(name, _, data)| (name, wide(&data))).collect()
}

/// Every gradient under `prefix` of the golden file, and no other, within `tolerance`.
#[track_caller]
pub fn assert_gradients(
    g: &Golden,
    prefix: &str,
    (model, grads): (&Model<f64>, &Params<f64>),
    (abs, rel): (f64, f64),
) {
    let mut found = Vec::new();
    for (name, grad) in named(grads, model) {
        assert_close(&name, &grad, g.get(&format!("{prefix}{name}")), abs, rel);
        found.push(name);
    }
    found.sort();
    assert_eq!(found, g.keys(prefix));
}

#[test]
fn sft_loss_and_gradients_are_those_of_hugging_face() {
    for name in &folders() {
        let g = Golden::open(&format!("{name}/sft.safetensors"));
        let rows = unpad(&g, "input_ids", "attention_mask");
        let model = load_for::<f64>(name, Head::Lm, &rows);
        let (grads, loss) = sft(&model, &g);
        assert_close("loss", &[loss], &[g.scalar("loss")], 1e-12, 1e-12);
        assert_gradients(&g, "grad/", (&model, &grads), (1e-11, 1e-9));
        let norm = grad_norm::norm(&Device::cpu(), grads.flat()).unwrap().get().unwrap();
        assert_close("norm", &[norm], &[g.scalar("grad_norm")], 0.0, 1e-10);

        // f32 against f64: relative norm at most 1e-5 (G5)
        let model = load_for::<f32>(name, Head::Lm, &rows);
        let (grads, loss) = sft(&model, &g);
        assert_earned(name, &[loss], &[g.scalar("loss_f32") as f32], &[g.scalar("loss")]);
        let (mut diff, mut all) = (0.0, 0.0);
        for (name, grad) in named(&grads, &model) {
            for (a, t) in grad.iter().zip(g.get(&format!("grad/{name}"))) {
                diff += (a - t) * (a - t);
                all += t * t;
            }
        }
        // Keys of almost no length make the delta rule steep: Hugging Face is 9e-5 off at most.
        let delta = Config::read(&golden::path(name)).unwrap().spec().unwrap().1.delta();
        let most = if delta.is_some() { 3e-5 } else { 1e-5 };
        assert!((diff / all).sqrt() < most, "{name}: {:e}", (diff / all).sqrt());
        g.all_read(&[]);
    }
}

/// The SFT batch.
pub fn sft_batch(g: &Golden) -> Batch {
    let rows = unpad(g, "input_ids", "attention_mask");
    let cols = g.shape("labels")[1];
    let labels = g.ints("labels");
    let mut batch = Batch::default();
    for (b, row) in rows.iter().enumerate() {
        let learn = (1..row.len()).filter(|t| labels[b * cols + t] != -100);
        batch.push_masked(row, &learn.map(|t| t..t + 1).collect::<Vec<_>>());
    }
    batch
}

/// Loss and gradients of the SFT batch.
pub fn sft<F: Float>(model: &Model<F>, g: &Golden) -> (Params<F>, f64) {
    let batch = sft_batch(g);
    let n = batch.selected().len() as f64;
    let mut grads = params(model.trained());
    let mut arena = pass_room(host(), model, &batch, keep_all(false));
    let (dev, scope) = (Device::cpu(), arena.scope());
    let mut loss = 0.0;
    Pass::new(&dev, model, &scope, &batch)
        .train(&mut grads, keep_all(false), |c| {
            loss = -c.y.host().iter().map(|x| x.f64()).sum::<f64>() / n;
            c.dy.host().fill(F::of(-1.0 / n));
            Ok(())
        })
        .unwrap();
    drop(scope);
    (grads, loss)
}

#[test]
fn reward_scores_losses_and_gradients_are_those_of_hugging_face() {
    let all = folders().into_iter().filter(|name| golden::path(name).join("rm").exists());
    for name in &all.collect::<Vec<_>>() {
        let g = Golden::open(&format!("{name}/rm.safetensors"));
        let rows = unpad(&g, "input_ids", "attention_mask");
        let model = load_for::<f64>(&format!("{name}/rm"), Head::Scalar, &rows);
        let (n, mut batch) = (rows.len() / 2, Batch::default());
        // chosen and rejected side by side; the golden file has all chosen rows first
        let order: Vec<usize> = (0..n).flat_map(|i| [i, n + i]).collect();
        order.iter().for_each(|i| batch.push_last(&rows[*i]));
        let want: Vec<f64> = order.iter().map(|i| g.get("scores")[*i]).collect();
        let mut grads = params(model.trained());
        let mut arena = pass_room(host(), &model, &batch, keep_all(false));
        let (dev, scope) = (Device::cpu(), arena.scope());
        Pass::new(&dev, &model, &scope, &batch)
            .train(&mut grads, keep_all(false), |LossColumns { y, mut dy, .. }| {
                assert_close(name, y.host(), &want, 1e-11, 1e-10);
                let mut losses = vec![("loss", &[][..], 0.0)];
                if g.has("margins") {
                    let others =
                        [("loss_margin", g.get("margins"), 0.0), ("loss_center", &[], 0.01)];
                    // The first one last: its gradient goes on.
                    losses.splice(0..0, others);
                }
                for (key, margins, centre) in losses {
                    let (dy, margins) = (dy.reborrow(), margins.into());
                    let t = Pairs { scores: y, margins, weights: None };
                    let s = bradley_terry::forward(&dev, dy, t, centre, n as f64)?.get()?;
                    assert_close(key, &[s.loss], &[g.scalar(key)], 1e-12, 1e-12);
                }
                Ok(())
            })
            .unwrap();
        assert_gradients(&g, "grad/", (&model, &grads), stored(name));
        assert!(grads.get(ParamKind::Score, None).is_some());
        g.all_read(&[]);
    }
}
