//! `verify_every`: a bit that changes between two steps is found, named, and stops the run.

use warpo::{
    Error,
    device::{Device, View},
    models::Params,
    rng::{Philox, Purpose},
    train::{Silent, Trainer},
};

use crate::support::{runs::trainer, temp_dir};

/// Flips a bit of a tensor, both drawn from `at`, as a particle would.
fn flip(params: &mut Params<f32>, at: u32) {
    let tensors = params.layout().tensors().len();
    let range = params.layout().tensors()[at as usize % tensors].range();
    let x = &mut params.flat_mut().host()[range];
    let i = at as usize / 1000 % x.len();
    x[i] = f32::from_bits(x[i].to_bits() ^ 1 << (at % 31));
}

/// Flips a bit of the policy's weights, moments or panels, or of the reference's weights. The
/// second time it is as it was.
fn spoil(run: &mut Trainer<f32>, what: usize, at: u32) -> &'static str {
    let state = &mut run.models.trained[0];
    match what {
        0 => flip(state.model.params_mut().unwrap(), at),
        1 => flip(&mut state.m, at),
        2 => flip(&mut state.v, at),
        // Panels of other weights than those that are there; a linear layer is tensor 2.
        3 => {
            let tensors = state.model.params().layout().tensors().len() as u32;
            let at = at / tensors * tensors + 2;
            flip(state.model.params_mut().unwrap(), at);
            state.model.repack(&Device::cpu()).unwrap();
            flip(state.model.params_mut().unwrap(), at);
        }
        _ => {
            let mut frozen = run.models.frozen.iter_mut();
            flip(frozen.find(|m| m.0.name == "reference").unwrap().1.params_mut().unwrap(), at);
        }
    }
    ["the weight ", "the first moment ", "the second moment ", "the panel ", "the weight "][what]
}

/// 100 flipped bits in weights, moments and panels: 100 are found, with the tensor's name.
#[test]
fn a_flipped_bit_is_found() {
    let dir = temp_dir("guard");
    let mut run = trainer(&dir, "ppo", &["verify_every=1"]).unwrap();
    run.step(&mut Silent).unwrap();
    run.step(&mut Silent).unwrap();
    run.verify().unwrap();
    let draw = Philox::new(5, 0, 0, Purpose::Pairs);
    for i in 0..100 {
        let (what, at) = (i as usize % 5, draw.below(i, 1 << 30));
        let name = spoil(&mut run, what, at);
        let error = run.step(&mut Silent).unwrap_err();
        let Error::Corrupt { step: 2, what: said } = &error else { panic!("{i}: {error}") };
        assert!(said.starts_with(name) && said.ends_with(" model"), "{i}: {said}");
        assert_eq!(error.exit_code(), 4);
        if what == 3 {
            run.models.trained[0].model.repack(&Device::cpu()).unwrap();
        } else {
            spoil(&mut run, what, at);
        }
        run.verify().unwrap();
    }
    run.step(&mut Silent).unwrap();
}

/// What is verified has the bits of what is not, for every algorithm.
#[test]
fn verifying_changes_no_bit() {
    for algorithm in ["sft", "reward", "dpo", "ppo"] {
        let dir = temp_dir(&format!("guard_{algorithm}"));
        let [plain, verified] = ["verify_every=0", "verify_every=2"].map(|every| {
            let mut run = trainer(&dir, algorithm, &[every]).unwrap();
            (0..4).for_each(|_| drop(run.step(&mut Silent).unwrap()));
            let weights: View<'_, f32> = run.models.trained[0].model.params().flat();
            weights.host().to_vec()
        });
        assert!(
            plain.iter().zip(&verified).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{algorithm}"
        );
    }
}
