//! Whole models against Hugging Face and TRL in float64: logits, log-probs, entropy, hidden states,
//! greedy tokens; losses and gradients of SFT, reward modelling and PPO.
//!
//! No golden tensor is skipped silently: each test ends by naming what it leaves to others.

use warpo::{
    device::{Device, Float},
    models::{
        Activations, Batch, BatchRows, Cache, Config, Head, Keep, LossColumns, Model, ParamKind,
        Params, Pass, PassShape,
    },
    ops::{
        bradley_terry::{self, Pairs},
        gae, grad_norm,
        kl::KlEstimator,
        matmul,
        ppo_loss::{self, PpoLoss, PpoTokens},
        sample,
        value_loss::{self, ValueLoss, ValueTokens},
        whiten::{self, Moments, Variance},
    },
    rng::{Purpose, Stream},
    rollout::{GenerationConfig, Generator, Prompt, Scorer, last_scores},
};

use crate::support::{
    PARAMS, assert_bits, assert_close, assert_earned, golden, golden::Golden, host, keep_all,
    params, pass_room, room, temp_dir, wide,
};

pub const MODELS: [&str; 3] = ["gpt2", "llama", "llama_tied"];

pub fn load<F: Float>(name: &str, head: Head) -> Model<F> {
    Model::load(&Device::cpu(), &golden::path(name), head, Some(0)).unwrap()
}

/// Tolerance of gradients and weights: those of `llama_tied` are rounded to f32, but for SFT.
pub fn stored(name: &str) -> (f64, f64) {
    let rounding = if name == "llama_tied" { f64::from(f32::EPSILON) / 2.0 } else { 0.0 };
    (1e-11, 1e-9 + rounding)
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
        let plain =
            real(&g, "right/logits_f32", mask).iter().map(|x| *x as f32).collect::<Vec<_>>();
        let ours = forward::<f32>(&load(name, Head::Lm), &rows).logits;
        assert_earned(name, &ours, &plain, &truth);

        // padded on the left: the same sequences at the same positions
        let mask = "left/attention_mask";
        assert_eq!(unpad(&g, "left/input_ids", mask), rows);
        let positions: Vec<f64> =
            rows.iter().flat_map(|r| (0..r.len()).map(|p| p as f64)).collect();
        assert_eq!(real(&g, "left/position_ids", mask), positions);
        assert_close(name, &pass.logits, &real(&g, "left/logits_f64", mask), 1e-10, 1e-10);
        let others =
            ["right/logprobs", "right/entropy", "left/logprobs", "left/entropy", "greedy/"];
        g.all_read(&others);
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
    for name in MODELS {
        for (folder, head) in [(name.to_owned(), Head::Lm), (format!("{name}/rm"), Head::Scalar)] {
            let from = golden::path(&folder);
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
    for name in MODELS {
        let g = Golden::open(&format!("{name}/io.safetensors"));
        let model = load::<f64>(name, Head::Lm);
        for side in ["right", "left"] {
            let rows = unpad(&g, &format!("{side}/input_ids"), &format!("{side}/attention_mask"));
            let mut batch = Batch::default();
            rows.iter().for_each(|r| batch.push_predicted(r, 1));
            let (logp, entropy) = policy(&model, &batch, &mut params(model.params().layout()));
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
        let others = ["right/logits", "right/hidden", "left/logits", "left/position", "greedy/"];
        g.all_read(&others);
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
        let settings = GenerationConfig {
            sampling: sample::SamplingParams::greedy(),
            max_new_tokens: 64,
            stop_ids: vec![eos],
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
        g.all_read(&["right/", "left/logits", "left/logprobs", "left/entropy", "left/position"]);
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
    for name in MODELS {
        let g = Golden::open(&format!("{name}/sft.safetensors"));
        let model = load::<f64>(name, Head::Lm);
        let (grads, loss) = sft(&model, &g);
        assert_close("loss", &[loss], &[g.scalar("loss")], 1e-12, 1e-12);
        assert_gradients(&g, "grad/", (&model, &grads), (1e-11, 1e-9));
        let norm = grad_norm::norm(&Device::cpu(), grads.flat()).unwrap().get().unwrap();
        assert_close("norm", &[norm], &[g.scalar("grad_norm")], 0.0, 1e-10);

        // f32 against f64: relative norm at most 1e-5 (G5)
        let model = load::<f32>(name, Head::Lm);
        let (grads, loss) = sft(&model, &g);
        assert_earned(name, &[loss], &[g.scalar("loss_f32") as f32], &[g.scalar("loss")]);
        let (mut diff, mut all) = (0.0, 0.0);
        for (name, grad) in named(&grads, &model) {
            for (a, t) in grad.iter().zip(g.get(&format!("grad/{name}"))) {
                diff += (a - t) * (a - t);
                all += t * t;
            }
        }
        assert!((diff / all).sqrt() < 1e-5, "{name}: {:e}", (diff / all).sqrt());
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
    let mut grads = params(model.params().layout());
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
    for name in MODELS {
        let g = Golden::open(&format!("{name}/rm.safetensors"));
        let model = load::<f64>(&format!("{name}/rm"), Head::Scalar);
        let rows = unpad(&g, "input_ids", "attention_mask");
        let (n, mut batch) = (rows.len() / 2, Batch::default());
        // chosen and rejected side by side; the golden file has all chosen rows first
        let order: Vec<usize> = (0..n).flat_map(|i| [i, n + i]).collect();
        order.iter().for_each(|i| batch.push_last(&rows[*i]));
        let want: Vec<f64> = order.iter().map(|i| g.get("scores")[*i]).collect();
        let mut grads = params(model.params().layout());
        let mut arena = pass_room(host(), &model, &batch, keep_all(false));
        let (dev, scope) = (Device::cpu(), arena.scope());
        Pass::new(&dev, &model, &scope, &batch)
            .train(&mut grads, keep_all(false), |LossColumns { y, mut dy, .. }| {
                assert_close("scores", y.host(), &want, 1e-11, 1e-10);
                for (key, margins, centre) in [
                    ("loss_margin", g.get("margins"), 0.0),
                    ("loss_center", &[], 0.01),
                    ("loss", &[], 0.0), // last: its gradient goes on
                ] {
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

/// A minibatch of TRL's PPOTrainer. TRL adds the score at `reward_slot`, the padding after the
/// response (its last token if there is no room), and keeps a value there: `valid_p1` is `valid`
/// and that kind. Our trainer adds the score at the last token and has no such kind. So these
/// columns are laid out as TRL's are; every op that turns them into losses is ours.
struct Minibatch {
    /// Prompt and response of each row.
    rows: Vec<Vec<u32>>,
    /// Tokens of each response.
    lens: Vec<usize>,
    /// Padded length of a response.
    cols: usize,
}

impl Minibatch {
    fn of(g: &Golden) -> Self {
        let rows = unpad(g, "query_responses", "attention_mask");
        let (prompts, responses) =
            (unpad(g, "queries", "query_mask"), unpad(g, "responses", "response_mask"));
        let both = prompts.iter().zip(&responses);
        assert_eq!(rows, both.map(|(p, r)| [&p[..], r].concat()).collect::<Vec<_>>());
        let (lens, cols) = (responses.iter().map(Vec::len).collect(), g.shape("responses")[1]);
        let this = Self { rows, lens, cols };
        let last: Vec<i64> = this.lens.iter().map(|n| *n as i64 - 1).collect();
        assert_eq!(g.ints("seq_last"), last);
        this
    }

    /// Columns of row `b` with `extra` kinds after its tokens, where there is room.
    fn len(&self, b: usize, extra: usize) -> usize {
        (self.lens[b] + extra).min(self.cols)
    }

    fn tokens(&self, extra: usize) -> usize {
        (0..self.lens.len()).map(|b| self.len(b, extra)).sum()
    }

    fn offsets(&self, extra: usize) -> Vec<u32> {
        let sum = |b| (0..b).map(|b| self.len(b, extra) as u32).sum();
        (0..=self.lens.len()).map(sum).collect()
    }

    /// `[rows, cols]` without padding.
    fn packed(&self, x: &[f64], extra: usize) -> Vec<f64> {
        let rows = x.chunks(self.cols).enumerate();
        rows.flat_map(|(b, x)| x[..self.len(b, extra)].to_vec()).collect()
    }

    /// The reverse, with `pad` as padding.
    fn padded(&self, x: &[f64], extra: usize, pad: f64) -> Vec<f64> {
        let offsets = self.offsets(extra);
        let row = |w: &[u32]| {
            let mut row = x[w[0] as usize..w[1] as usize].to_vec();
            row.resize(self.cols, pad);
            row
        };
        offsets.windows(2).flat_map(row).collect()
    }

    /// Advantages of tokens and returns of tokens and kinds, from the stored log-probs and values.
    fn estimate(&self, g: &Golden, tag: &str) -> (Vec<f64>, Vec<f64>) {
        let key = |name: &str| format!("{tag}{name}");
        let same = |name: &str, x: &[f64], extra: usize| {
            let x = self.padded(x, extra, 0.0);
            assert_close(&key(name), &x, g.get(&key(name)), 1e-12, 1e-12);
        };
        let ones = |extra| self.padded(&vec![1.0; self.tokens(extra)], extra, 0.0);
        assert_eq!((g.get(&key("valid")), g.get(&key("valid_p1"))), (&ones(0)[..], &ones(1)[..]));
        let estimator = if tag.is_empty() { KlEstimator::K1 } else { KlEstimator::K3 };
        let column = |name| self.packed(g.get(name), 0);
        let (old, reference) = (column("old_logprobs"), column("ref_logprobs"));
        let kl: Vec<f64> =
            old.iter().zip(&reference).map(|(l, r)| estimator.value(*l, *r)).collect();
        same("kl", &kl, 0);

        let mut rewards: Vec<f64> = self.padded(&kl, 0, 0.0).iter().map(|k| -0.05 * k).collect();
        for (b, score) in g.get("scores").iter().enumerate() {
            let kind = self.lens[b].min(self.cols - 1);
            assert_eq!(g.ints(&key("reward_slot"))[b], kind as i64);
            rewards[b * self.cols + kind] += score;
        }
        let (dev, mut rewards) = (Device::cpu(), self.packed(&rewards, 1));
        if tag == "k3w/" {
            let moments = Moments::of(&dev, (&rewards).into()).unwrap();
            let unbiased = Variance::Unbiased;
            whiten::apply(&dev, (&mut rewards).into(), &moments, false, unbiased, 1e-8).unwrap();
        }
        same("rewards", &rewards, 1);

        let values = self.packed(g.get(&key("values")), 1);
        let (mut advantages, mut returns) = (vec![0.0; values.len()], vec![0.0; values.len()]);
        let offsets = self.offsets(1);
        let of = gae::RewardColumns {
            rewards: (&rewards).into(),
            values: (&values).into(),
            offsets: (&offsets).into(),
            gamma: 1.0,
            lambda: 0.95,
        };
        gae::forward(&dev, (&mut advantages).into(), (&mut returns).into(), of).unwrap();
        same("raw_advantages", &advantages, 1);
        same("returns", &returns, 1);

        let mut advantages = self.packed(&self.padded(&advantages, 1, 0.0), 0);
        let (moments, unbiased) =
            (Moments::of(&dev, (&advantages).into()).unwrap(), Variance::Unbiased);
        whiten::apply(&dev, (&mut advantages).into(), &moments, true, unbiased, 1e-8).unwrap();
        same("advantages", &advantages, 0);
        (advantages, returns)
    }
}

#[test]
fn ppo_losses_and_gradients_are_those_of_trl() {
    for name in MODELS {
        let g = Golden::open(&format!("{name}/ppo.safetensors"));
        let m = Minibatch::of(&g);
        let scalar = |key: String| g.scalar(&key);
        let mut policy_loss = std::collections::HashMap::new();

        let model = load::<f64>(name, Head::Lm);
        let (mut batch, mut grads) = (Batch::default(), params(model.params().layout()));
        m.rows.iter().zip(&m.lens).for_each(|(r, n)| batch.push_predicted(r, r.len() - n));
        let (dev, mut memory) = (Device::cpu(), pass_room(host(), &model, &batch, keep_all(false)));
        let scope = memory.scope();
        Pass::new(&dev, &model, &scope, &batch)
            .train(&mut grads, keep_all(false), |mut c| {
                let logp = c.y.host();
                let want = m.packed(g.get("new_logprobs"), 0);
                assert_close("new_logprobs", logp, &want, 1e-11, 1e-10);
                let (old, n) = (m.packed(g.get("old_logprobs"), 0), logp.len() as f64);
                // k1 last: its gradient goes on
                for tag in ["k3w/", ""] {
                    let (advantages, _) = m.estimate(&g, tag);
                    let tokens = PpoTokens {
                        logp: c.y,
                        old_logp: (&old).into(),
                        ref_logp: None,
                        entropy: None,
                        advantages: (&advantages).into(),
                        weights: None,
                    };
                    let s = PpoLoss {
                        clip_low: 0.2,
                        clip_high: 0.2,
                        dual_clip: None,
                        kl: None,
                        entropy_coef: 0.0,
                    };
                    let s = ppo_loss::policy(&dev, c.dy.reborrow(), None, tokens, &s, n)?.get()?;
                    let close = |key: &str, x: f64| {
                        let key = format!("{tag}{key}");
                        assert_close(&key, &[x], &[g.scalar(&key)], 1e-11, 1e-10);
                    };
                    close("pg_loss", s.loss);
                    close("pg_clipfrac", (s.clipped_low + s.clipped_high) / n);
                    assert!(s.clipped_low + s.clipped_high > 0.0, "{name}: nothing is clipped");
                    // TRL's approxkl is k2, over the padding too.
                    let k2 = logp.iter().zip(&old).map(|(l, o)| KlEstimator::K2.value(*l, *o));
                    close("approxkl", k2.sum::<f64>() / (m.lens.len() * m.cols) as f64);
                    let ratio: Vec<f64> =
                        logp.iter().zip(&old).map(|(l, o)| (l - o).exp()).collect();
                    let want = g.get(&format!("{tag}ratio"));
                    assert_close("ratio", &m.padded(&ratio, 0, 1.0), want, 1e-11, 1e-10);
                    policy_loss.insert(tag, s.loss);
                }
                Ok(())
            })
            .unwrap();
        assert_gradients(&g, "grad_policy/", (&model, &grads), stored(name));

        let model = load::<f64>(&format!("{name}/rm"), Head::Scalar);
        let (mut batch, mut grads) = (Batch::default(), params(model.params().layout()));
        for (b, row) in m.rows.iter().enumerate() {
            // The kind after the response: the row of its last token, "before" a padding token.
            let start = row.len() - m.lens[b];
            let kinds = start..start + m.len(b, 1);
            batch.push_masked(&[row, &[0][..]].concat(), &[kinds]);
        }
        let (n, mut memory) =
            (m.tokens(1) as f64, pass_room(host(), &model, &batch, keep_all(false)));
        let scope = memory.scope();
        Pass::new(&dev, &model, &scope, &batch)
            .train(&mut grads, keep_all(false), |LossColumns { y, mut dy, .. }| {
                assert_close("vpred", y.host(), &m.packed(g.get("vpred"), 1), 1e-11, 1e-10);
                for tag in ["k3w/", ""] {
                    let (_, returns) = m.estimate(&g, tag);
                    let old = m.packed(g.get(&format!("{tag}values")), 1);
                    let (old, returns) = ((&old).into(), (&returns).into());
                    let t = ValueTokens { v: y, old, returns, weights: None };
                    let s = ValueLoss { clip: Some(0.2), coef: 0.1 };
                    let s = value_loss::forward(&dev, dy.reborrow(), t, s, n)?.get()?;
                    let vf = scalar(format!("{tag}vf_loss"));
                    assert_close("vf_loss", &[s.loss], &[0.1 * vf], 1e-11, 1e-10);
                    let clipped = scalar(format!("{tag}vf_clipfrac"));
                    assert_close("vf_clipfrac", &[s.clipped / n], &[clipped], 0.0, 1e-14);
                    let loss = policy_loss[tag] + s.loss;
                    assert_close("loss", &[loss], &[scalar(format!("{tag}loss"))], 1e-11, 1e-10);
                }
                Ok(())
            })
            .unwrap();
        assert_gradients(&g, "grad_value/", (&model, &grads), stored(name));

        let rows: Vec<&[u32]> = m.rows.iter().map(Vec::as_slice).collect();
        let scorer = Scorer { rows: 64, sequences: 4 };
        let mut arena = room(scorer.plan::<f64>(host(), model.spec(), model.head()).unwrap());
        let scores = last_scores(&dev, &model, &mut arena, scorer, &rows).unwrap();
        assert_close("scores", &scores, g.get("scores"), 1e-11, 1e-10);
        g.all_read(&[]);
    }
}
