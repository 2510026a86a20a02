//! `verify_every`: what a step left is what the next one finds. Sums of all weights, moments and
//! panels tell a bit that memory lost or a program overwrote in between.

use bytemuck::Pod;

use super::models::Models;
use crate::{
    device::{Device, Element},
    error::{Error, Result},
    models::{self, Layout, Model, ParamTensor},
};

/// Sums of what a step left, by name.
#[derive(Debug)]
pub struct Guard {
    /// The step that left them.
    pub step: u64,
    sums: Vec<(String, u64)>,
}

impl Guard {
    /// Sums the frozen models of a run, which no step changes.
    pub fn of_frozen<T: Element<Acc = f32>>(dev: &Device, all: &Models<T>) -> Result<Self> {
        let mut sums = Vec::new();
        for (role, model) in &all.frozen {
            weights(dev, role.name, model, &mut sums)?;
        }
        Ok(Self { step: 0, sums })
    }

    /// Sums what the trained models of a run hold after `step`.
    pub fn of_trained<T: Element<Acc = f32>>(
        dev: &Device,
        all: &Models<T>,
        step: u64,
    ) -> Result<Self> {
        let mut sums = Vec::new();
        for state in &all.trained {
            let (model, role) = (&state.model, state.role.name);
            weights(dev, role, model, &mut sums)?;
            for (what, x) in [
                ("f32 weight", model.master()?),
                ("first moment", state.m.flat()),
                ("second moment", state.v.flat()),
            ] {
                let flat = dev.on_host(x)?;
                for t in model.trained().tensors() {
                    let name = tensor(model, model.trained(), t, (what, role));
                    sums.push((name, sum(&flat[t.range()])));
                }
            }
        }
        Ok(Self { step, sums })
    }

    /// Compares them with those of now.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the first tensor that changed since `step`.
    pub fn check(&self, now: &Self, step: u64) -> Result<()> {
        let changed = self.sums.iter().zip(&now.sums).find(|(a, b)| a != b);
        changed.map_or(Ok(()), |((what, _), _)| Err(Error::Corrupt { step, what: what.clone() }))
    }
}

/// Adds the weights that a model computes with, and their panels.
fn weights<T: Element>(
    dev: &Device,
    role: &str,
    model: &Model<T>,
    sums: &mut Vec<(String, u64)>,
) -> Result<()> {
    let flat = model.on_host(dev)?;
    let layout = model.params().layout();
    for t in layout.tensors() {
        sums.push((tensor(model, layout, t, ("weight", role)), sum(&flat[t.range()])));
    }
    if let Some(own) = model.adapter() {
        for t in own.layout().tensors() {
            let numbers = dev.on_host(own.tensor(t))?;
            sums.push((tensor(model, own.layout(), t, ("weight", role)), sum(&numbers)));
        }
    }
    for (layout, t, panel) in model.panels() {
        sums.push((tensor(model, layout, t, ("panel", role)), sum(&dev.on_host(panel)?)));
    }
    Ok(())
}

fn tensor<T: Element>(
    model: &Model<T>,
    layout: &Layout,
    t: &ParamTensor,
    (what, role): (&str, &str),
) -> String {
    let name = models::tensor_at(model, layout, t.offset).unwrap_or_default();
    format!("the {what} {name} of the {role} model")
}

/// A sum of 32-bit words, each times an odd number of its own: no single flipped bit leaves it.
fn sum<T: Pod>(x: &[T]) -> u64 {
    let bytes: &[u8] = bytemuck::cast_slice(x);
    let word = |chunk: &[u8]| chunk.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
    let terms = bytes.chunks(4).zip(0u64..).map(|(chunk, i)| word(chunk).wrapping_mul(2 * i + 1));
    terms.fold(0, u64::wrapping_add)
}
