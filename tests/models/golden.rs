//! Whole models against Hugging Face in float64: logits, log-probs, entropy, hidden states, greedy
//! tokens, gradients of the SFT and reward losses.

use warpo::{
    device::{Arena, Device, Float},
    models::{Activations, Batch, Cache, Head, Model, Params, Selected, Slot},
    ops::{attention::PAGE, matmul, sample},
    rollout::{Generator, Prompt, Settings},
    train::pass,
};

use crate::support::{assert_close, golden, golden::Golden, wide};

pub const MODELS: [&str; 3] = ["gpt2", "llama", "llama_tied"];

pub fn load<F: Float>(name: &str, head: Head) -> Model<F> {
    Model::load(&Device::cpu(), &golden::path(name), head, 0).unwrap()
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

struct Pass<F> {
    logits: Vec<F>,
    streams: Vec<Vec<F>>,
    hidden: Vec<F>,
}

/// Logits at every position of every sequence, packed.
fn forward<F: Float>(model: &Model<F>, rows: &[Vec<u32>]) -> Pass<F> {
    let dev = Device::cpu();
    let mut batch = Batch::default();
    rows.iter().for_each(|r| batch.push_last(r));
    let n = batch.len();
    let spec = model.spec();
    let mut arena = Arena::new(1 << 28);
    let scope = arena.scope();
    let mut acts = Activations::new(&scope, spec, n, true).unwrap();
    let pages = n / PAGE + rows.len();
    let mut cache = Cache::transient(&scope, spec, pages).unwrap();
    let mut selected = Selected::new(&scope, spec, n).unwrap();
    model.forward(&dev, &batch.rows(), &mut acts, &mut cache).unwrap();
    let all: Vec<u32> = (0..n as u32).collect();
    model.select(&dev, &acts, (&all).into(), &mut selected).unwrap();
    let mut logits = vec![F::ZERO; n * spec.vocab];
    let (_, packed) = model.lm_head().unwrap();
    matmul::forward(&dev, (&mut logits).into(), selected.hidden(), packed, None).unwrap();
    let streams = (0..spec.layers).map(|l| acts.stream(l).unwrap().host().to_vec()).collect();
    Pass { logits, streams, hidden: selected.hidden().host().to_vec() }
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
    for name in MODELS {
        let g = Golden::open(&format!("{name}/io.safetensors"));
        let rows = unpad(&g, "right/input_ids", "right/attention_mask");
        let mask = "right/attention_mask";
        let truth = real(&g, "right/logits_f64", mask);
        let pass = forward::<f64>(&load(name, Head::Lm), &rows);
        assert_close(name, &pass.logits, &truth, 1e-10, 1e-10);
        for (l, x) in pass.streams.iter().enumerate() {
            let want = real(&g, &format!("right/hidden_states/{l}"), mask);
            assert_close(&format!("{name} stream {l}"), x, &want, 1e-10, 1e-10);
        }
        let last = format!("right/hidden_states/{}", pass.streams.len());
        assert_close(name, &pass.hidden, &real(&g, &last, mask), 1e-10, 1e-10);

        // f32: at most twice as far from the truth as Hugging Face's own f32
        let plain = real(&g, "right/logits_f32", mask);
        let error =
            |x: &[f64]| x.iter().zip(&truth).map(|(a, t)| (a - t).abs()).fold(0.0, f64::max);
        let ours = error(&wide(&forward::<f32>(&load(name, Head::Lm), &rows).logits));
        assert!(ours <= 2.0 * error(&plain), "{name}: {ours:e} > 2 * {:e}", error(&plain));
    }
}

/// Log-probs and entropy of the padded batch, computed without padding.
#[test]
fn logprobs_and_entropy_are_those_of_hugging_face() {
    for name in MODELS {
        let g = Golden::open(&format!("{name}/io.safetensors"));
        let model = load::<f64>(name, Head::Lm);
        for side in ["right", "left"] {
            let rows = unpad(&g, &format!("{side}/input_ids"), &format!("{side}/attention_mask"));
            let mut batch = Batch::default();
            rows.iter().for_each(|r| batch.push_predicted(r, 1));
            let (logp, entropy) =
                policy(&model, &batch, &mut Params::zeros(model.params().layout()));
            // Golden rows: [b, t] is the log-prob of token t + 1, 0 where either is padding.
            let mask = g.ints(&format!("{side}/attention_mask"));
            let cols = g.shape(&format!("{side}/attention_mask"))[1];
            let want = g.get(&format!("{side}/logprobs_f64"));
            let h = g.get(&format!("{side}/entropy_f64"));
            let both = |b: usize, t: usize| mask[b * cols + t] == 1 && mask[b * cols + t + 1] == 1;
            let at: Vec<(usize, usize)> = (0..rows.len())
                .flat_map(|b| (0..cols - 1).map(move |t| (b, t)))
                .filter(|(b, t)| both(*b, *t))
                .collect();
            let want: Vec<f64> = at.iter().map(|(b, t)| want[b * (cols - 1) + t]).collect();
            let h: Vec<f64> = at.iter().map(|(b, t)| h[b * cols + t]).collect();
            assert_close(&format!("{name} {side} logp"), &logp, &want, 1e-11, 1e-10);
            assert_close(&format!("{name} {side} entropy"), &entropy, &h, 1e-10, 1e-10);
        }
    }
}

/// Runs a policy pass with gradient 0.
fn policy<F: Float>(model: &Model<F>, batch: &Batch, grads: &mut Params<F>) -> (Vec<F>, Vec<F>) {
    let mut arena = Arena::new(1 << 28);
    let (mut logp, mut entropy) = (Vec::new(), Vec::new());
    let (dev, scope) = (Device::cpu(), arena.scope());
    pass::policy(&dev, model, grads, &scope, batch, F::ONE, true, |c| {
        logp = c.logp.host().to_vec();
        entropy = c.entropy.unwrap().host().to_vec();
        c.dlogp.host().fill(F::ZERO);
        c.dentropy.unwrap().host().fill(F::ZERO);
        Ok(())
    })
    .unwrap();
    (logp, entropy)
}

#[test]
fn greedy_tokens_are_those_of_hugging_face() {
    for name in MODELS {
        let g = Golden::open(&format!("{name}/io.safetensors"));
        let model = load::<f32>(name, Head::Lm);
        let prompts: Vec<Prompt> = unpad(&g, "left/input_ids", "left/attention_mask")
            .into_iter()
            .enumerate()
            .map(|(i, ids)| Prompt { sample: i as u64, ids })
            .collect();
        let eos = serde_json::from_str::<serde_json::Value>(
            &std::fs::read_to_string(golden::path(name).join("config.json")).unwrap(),
        )
        .unwrap()["eos_token_id"]
            .as_u64()
            .unwrap() as u32;
        let settings = Settings {
            sampling: sample::Params::greedy(),
            max_new_tokens: 64,
            stop_ids: vec![eos],
            seed: 0,
            step: 0,
        };
        let generator = Generator::for_prompts(&prompts, 64, 3, 16);
        let mut arena = Arena::new(generator.plan::<f32>(model.spec()).unwrap());
        let dev = Device::cpu();
        let out = generator.run(&dev, &model, &arena.scope(), &prompts, &settings, |_| true);
        let out = out.unwrap().unwrap();
        let cols = g.shape("greedy/sequences")[1];
        let start = g.shape("left/input_ids")[1];
        for ((b, n), done) in g.ints("greedy/new_tokens").iter().enumerate().zip(&out) {
            let row = &g.ints("greedy/sequences")[b * cols..][..cols];
            let want: Vec<u32> =
                row[start..start + *n as usize].iter().map(|x| *x as u32).collect();
            assert_eq!(done.ids, want, "{name} row {b}");
        }
    }
}

/// Names of the fixtures' parameters, and where they are in our layout.
pub fn named<F: Float>(params: &Params<F>, model: &Model<F>) -> Vec<(String, Vec<f64>)> {
    warpo::models::named(model, params)
        .into_iter()
        .map(|(name, _, data)| (name, wide(&data)))
        .collect()
}

#[test]
fn sft_gradients_are_those_of_hugging_face() {
    for name in MODELS {
        let g = Golden::open(&format!("{name}/sft.safetensors"));
        let model = load::<f64>(name, Head::Lm);
        let (mut grads, loss) = sft(&model, &g);
        assert_close("loss", &[loss], &[g.scalar("loss")], 1e-12, 1e-12);
        let mut found = 0;
        for (name, grad) in named(&grads, &model) {
            assert_close(&name, &grad, g.get(&format!("grad/{name}")), 1e-11, 1e-9);
            found += 1;
        }
        assert_eq!(found, g.keys("grad/").len(), "{name}: every golden gradient is compared");
        let norm = grads.flat().host().iter().map(|x| x * x).sum::<f64>().sqrt();
        assert_close("norm", &[norm], &[g.scalar("grad_norm")], 0.0, 1e-10);
        grads.flat_mut().host().fill(0.0);

        // f32 against f64: relative norm at most 1e-5 (G5)
        let (grads32, _) = sft(&load::<f32>(name, Head::Lm), &g);
        let (mut diff, mut all) = (0.0, 0.0);
        for (name, grad) in named(&grads32, &load::<f32>(name, Head::Lm)) {
            for (a, t) in grad.iter().zip(g.get(&format!("grad/{name}"))) {
                diff += (a - t) * (a - t);
                all += t * t;
            }
        }
        assert!((diff / all).sqrt() < 1e-5, "{name}: {:e}", (diff / all).sqrt());
    }
}

fn sft<F: Float>(model: &Model<F>, g: &Golden) -> (Params<F>, f64) {
    let rows = unpad(g, "input_ids", "attention_mask");
    let cols = g.shape("labels")[1];
    let labels = g.ints("labels");
    let mut batch = Batch::default();
    for (b, row) in rows.iter().enumerate() {
        let learn = (1..row.len()).filter(|t| labels[b * cols + t] != -100);
        batch.push_masked(row, learn.map(|t| t..t + 1));
    }
    let n = batch.selected().len() as f64;
    let mut grads = Params::zeros(model.params().layout());
    let mut arena = Arena::new(1 << 28);
    let (dev, scope) = (Device::cpu(), arena.scope());
    let mut loss = 0.0;
    pass::policy(&dev, model, &mut grads, &scope, &batch, F::ONE, false, |c| {
        loss = -c.logp.host().iter().map(|x| x.f64()).sum::<f64>() / n;
        c.dlogp.host().fill(F::of(-1.0 / n));
        Ok(())
    })
    .unwrap();
    drop(scope);
    (grads, loss)
}

#[test]
fn reward_scores_and_gradients_are_those_of_hugging_face() {
    for name in MODELS {
        let g = Golden::open(&format!("{name}/rm.safetensors"));
        let model = load::<f64>(&format!("{name}/rm"), Head::Scalar);
        let rows = unpad(&g, "input_ids", "attention_mask");
        let mut batch = Batch::default();
        rows.iter().for_each(|r| batch.push_last(r));
        let mut grads = Params::zeros(model.params().layout());
        let mut arena = Arena::new(1 << 28);
        let (dev, scope) = (Device::cpu(), arena.scope());
        pass::scalar(&dev, &model, &mut grads, &scope, &batch, |y, dy| {
            let y = y.host();
            assert_close("scores", y, g.get("scores"), 1e-11, 1e-10);
            let (dy, n) = (dy.host(), y.len() / 2);
            for i in 0..n {
                let p = 1.0 / (1.0 + (y[i] - y[n + i]).exp());
                (dy[i], dy[n + i]) = (-p / n as f64, p / n as f64);
            }
            Ok(())
        })
        .unwrap();
        let mut found = 0;
        for (name, grad) in named(&grads, &model) {
            // These goldens were rounded to f32 for some models.
            assert_close(&name, &grad, g.get(&format!("grad/{name}")), 1e-8, 1e-6);
            found += 1;
        }
        assert_eq!(found, g.keys("grad/").len());
        assert!(grads.get(Slot::Score, None).is_some());
    }
}
