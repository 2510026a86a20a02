//! Property 2 of models with adapters.

use half::bf16;
use warpo::{
    device::{Device, Element},
    models::{Head, Model},
    rollout::{GenerationConfig, Prompt},
};

use super::engine::{FILTERS, generate, logprobs, prompts, settings, trained};
use crate::{
    models::adapter::load,
    support::{assert_bits, devices, golden, sim},
};

/// The log-prob that is recorded when a token is sampled is the one of the training forward, in f32
/// and on a device, however slots, rows and micro-batches are cut.
#[test]
fn rollout_with_an_adapter_equals_training() {
    let prompts = prompts(6, 151);
    let settings = settings(FILTERS[0], 12);
    fn check<T: Element<Acc = f32>>(dev: &Device, prompts: &[Prompt], settings: &GenerationConfig) {
        for at in [("lora_llama_all_r4", "llama"), ("lora_qwen2_qv_rslora", "qwen2")] {
            let model: Model<T> = load(dev, at, Head::Lm);
            for (slots, rows, per) in [(2, 41, 6), (6, 512, 1)] {
                let done = generate(dev, &model, prompts, settings, (slots, rows));
                let what = format!("{at:?} {slots} slots {rows} rows");
                let ours = logprobs(&done);
                assert_bits(&what, &ours, &trained(dev, &model, prompts, &done, 1.0, per));
                let base: Model<T> = Model::load(dev, &golden::path(at.1), Head::Lm, None).unwrap();
                assert!(ours != trained(dev, &base, prompts, &done, 1.0, per), "{what}");
            }
        }
    }
    devices().iter().for_each(|dev| check::<f32>(dev, &prompts, &settings));
    sim::on_devices(|dev| check::<bf16>(dev, &prompts[..3], &settings));
}
