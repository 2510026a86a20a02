//! Models on a CUDA device, in bf16: what they say and learn is what Hugging Face computes in f64,
//! as far as bf16 goes; and what the device takes wider changes nothing.

use half::bf16;
use warpo::{
    device::{Device, Element},
    models::{
        self, Batch, Head, Keep, LoadOptions, Model, ParamKind, Params, Pass, PassOptions,
        Residency,
    },
};

use super::golden::{folders, named, on_device, sft, sft_batch, unpad};
use crate::support::{
    assert_bits, golden, golden::Golden, host, keep_all, pass_room, sim, temp_dir, wide,
};

fn load(dev: &Device, name: &str, head: Head) -> Model<bf16> {
    Model::load_trained(dev, &golden::path(name), head, None).unwrap()
}

/// For the longest of the sequences of SFT.
fn load_sft<T: Element>(dev: &Device, name: &str, g: &Golden) -> Model<T> {
    let longest = unpad(g, "input_ids", "attention_mask").iter().map(Vec::len).max();
    let residency = Residency::Trained;
    let options = LoadOptions { longest, residency, ..LoadOptions::frozen(Head::Lm) };
    models::load(dev, &golden::path(name), options).unwrap()
}

/// Loss and gradients of the SFT batch, the gradients by the names of Hugging Face.
fn learn(
    dev: &Device,
    model: &Model<bf16>,
    batch: &Batch,
    keep: Keep,
) -> (f64, Vec<(String, Vec<f32>)>) {
    let mut grads = Params::zeros(dev, "gradients", model.trained()).unwrap();
    let options = PassOptions { entropy: false, keep, balance: 0.0 };
    let mut arena = pass_room(dev, model, batch, options);
    let (scope, mut loss) = (arena.scope(), 0.0);
    Pass::new(dev, model, &scope, batch)
        .train(&mut grads, options, |c| {
            let logp = dev.read(c.y)?;
            let n = logp.len();
            loss = -logp.iter().map(|x| f64::from(*x)).sum::<f64>() / n as f64;
            dev.write(c.dy, &vec![-1.0 / n as f32; n])
        })
        .unwrap();
    let named = models::named(dev, model, &grads).unwrap();
    // What lies beside the stored weights has no gradient, so that it stays 0.
    let all = dev.read(grads.flat()).unwrap();
    let sum = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x.abs())).sum::<f64>();
    let (inside, whole) = (
        sum(&mut named.iter().flat_map(|(_, _, x)| x.iter().copied())),
        sum(&mut all.iter().copied()),
    );
    assert!((inside - whole).abs() <= 1e-9 * whole, "{inside} of {whole}");
    (loss, named.into_iter().map(|(name, _, x)| (name, x)).collect())
}

/// How far gradients are from the golden ones: the norm of the difference, relative.
fn error<'a>(g: &Golden, grads: impl Iterator<Item = (&'a str, Vec<f64>)>) -> f64 {
    let (mut off, mut all) = (0.0, 0.0);
    for (key, ours) in grads {
        let truth = g.get(&format!("grad/{key}"));
        assert_eq!(ours.len(), truth.len(), "{key}");
        for (a, t) in ours.iter().zip(truth) {
            off += (a - t).powi(2);
            all += t * t;
        }
    }
    (off / all).sqrt()
}

/// The [`error`] of gradients that are computed in f64 with weights in bf16.
fn rounded_weights(name: &str, g: &Golden) -> f64 {
    let mut model: Model<f64> = load_sft(host(), name, g);
    let all = model.master().unwrap().host();
    let rounded: Vec<f64> = all.iter().map(|x| <bf16 as Element>::of(*x).f64()).collect();
    model.set_master(host(), &rounded).unwrap();
    let grads = named(&sft(&model, g).0, &model);
    let error = error(g, grads.iter().map(|(key, x)| (&**key, x.clone())));
    println!("{name}: with rounded weights the gradient is off by {error:.1e}");
    error
}

/// Loss and every gradient are those of f64 to bf16's 8 bits, for each family; and the backward
/// pass that computes blocks again has the bits of the one that kept them.
#[test]
fn models_learn_on_a_device_what_they_learn_in_f64() {
    sim::on_devices(|dev| {
        for name in &on_device().collect::<Vec<_>>() {
            let g = Golden::open(&format!("{name}/sft.safetensors"));
            let (model, batch) = (load_sft(dev, name, &g), sft_batch(&g));
            let (loss, grads) = learn(dev, &model, &batch, Keep::All);
            let truth = g.scalar("loss");
            assert!((loss - truth).abs() < truth / 256.0, "{name}: {loss} for {truth}");
            let error = error(&g, grads.iter().map(|(key, x)| (&**key, wide(x))));
            println!("{name}: loss off by {:.1e}, gradient by {error:.1e}", loss / truth - 1.0);
            // Yarn sharpens scores, and with them their rounding. Close choices of experts, and
            // close limits, fall to the other side in 8 bits.
            let most = match (&model.spec().experts, model.spec().delta()) {
                (None, None) => 0.05,
                (Some(_), None) => 0.1,
                // Keys of almost no length are normalised: what bf16 makes of the weights alone
                // turns them.
                (_, Some(_)) => 2.0 * rounded_weights(name, &g),
            };
            assert!(error < most, "{name}: the gradient is off by {error}");

            let (again, recomputed) = learn(dev, &model, &batch, Keep::Streams);
            assert_eq!(again.to_bits(), loss.to_bits());
            for ((key, a), (_, b)) in grads.iter().zip(&recomputed) {
                assert_bits(key, a, b);
            }
        }
    });
}

/// On the CPU too.
#[test]
fn recomputed_blocks_have_the_bits_of_kept_ones() {
    let dev = Device::cpu();
    for name in &folders() {
        let g = Golden::open(&format!("{name}/sft.safetensors"));
        let model: Model<f32> = load_sft(&dev, name, &g);
        let (kept, _) = sft(&model, &g);
        let batch = sft_batch(&g);
        let mut grads = Params::zeros(&dev, "gradients", model.params().layout()).unwrap();
        let options = PassOptions { entropy: false, keep: Keep::Streams, balance: 0.0 };
        let all = pass_room(&dev, &model, &batch, keep_all(false)).bytes();
        let mut arena = pass_room(&dev, &model, &batch, options);
        let less = arena.bytes() < all || model.spec().layers == 1;
        assert!(less, "{name}: {} of {all}", arena.bytes());
        let (scope, n) = (arena.scope(), batch.selected().len() as f32);
        Pass::new(&dev, &model, &scope, &batch)
            .train(&mut grads, options, |c| {
                c.dy.host().fill(-1.0 / n);
                Ok(())
            })
            .unwrap();
        for ((key, a), (_, b)) in named(&kept, &model).iter().zip(&named(&grads, &model)) {
            assert!(a == b, "{name}: {key}");
        }
    }
}

/// A model goes to a device and back to a folder with not a bit of its f32 weights changed,
/// whatever width its heads have there; a frozen one computes with the same numbers.
#[test]
fn weights_come_back_from_a_device_as_they_were() {
    sim::on_devices(|dev| {
        let dir = temp_dir(&format!("weights_of_{:?}", std::thread::current().id()));
        let all = on_device().map(|m| (m, Head::Lm));
        for (name, head) in all.chain([("llama/rm".into(), Head::Scalar)]) {
            let model = load(dev, &name, head);
            models::save(dev, &model, &dir).unwrap();
            let back = Model::<f32>::load(&Device::cpu(), &dir, head, None).unwrap();
            let first =
                Model::<f32>::load(&Device::cpu(), &golden::path(&name), head, None).unwrap();
            assert_bits(&name, back.params().flat().host(), first.params().flat().host());
            assert_eq!(models::count(&model), models::count(&first), "{name}");

            let path = golden::path(&name);
            let frozen = Model::<bf16>::load(dev, &path, head, None).unwrap();
            let read = |m: &Model<bf16>| dev.read(m.params().flat()).unwrap();
            assert_eq!(read(&frozen), read(&model), "{name}");
            assert!(frozen.master().is_err(), "a frozen model has no f32 weights");
            if head == Head::Lm {
                let value = Model::<bf16>::load_trained(dev, &path, Head::Scalar, Some(9)).unwrap();
                assert_eq!(value.master().unwrap().len(), value.params().flat().len());
                assert!(value.params().get(ParamKind::Score, None).is_some());
            }
        }
    });
}

#[test]
fn a_width_that_no_kernel_takes_is_named() {
    sim::on_devices(|dev| {
        let e = Model::<bf16>::load(dev, &golden::path("llama_tied"), Head::Lm, None).unwrap_err();
        let want = "hidden size on a CUDA device: got 36, wanted a multiple of 8";
        assert_eq!(e.to_string(), want);
    });
}
