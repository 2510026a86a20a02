//! A model that is trained: its weights, gradients and moments.

use super::settings::Settings;
use crate::{
    device::{Buffer, Device, Later},
    error::{Error, Result},
    models::{self, Layout, Model, Params},
    ops::{
        adamw::{self, Hyper},
        grad_norm,
    },
};

/// A trained model and its optimizer.
#[derive(Debug)]
pub struct Role {
    /// `policy`, `value` or `reward`: names its tensors in checkpoints and messages.
    pub name: &'static str,
    /// The model; its weights are the f32 masters.
    pub model: Model<f32>,
    /// Gradients of the present step.
    pub grads: Params<f32>,
    /// First moments.
    pub m: Params<f32>,
    /// Second moments.
    pub v: Params<f32>,
    /// Updates so far.
    pub updates: u64,
    /// Which weights decay, as [`adamw::step`] wants it.
    groups: Buffer<'static, u32>,
}

impl Role {
    /// A model at the start of its training.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is no room for gradients and moments.
    pub fn new(dev: &Device, name: &'static str, model: Model<f32>) -> Result<Self> {
        let layout = model.params().layout().clone();
        let zeros = |what| Params::zeros(dev, what, &layout);
        let (grads, m, v) = (zeros("gradients")?, zeros("moments")?, zeros("moments")?);
        let groups = Buffer::of(dev, "groups of weights", &groups(&layout))?;
        Ok(Self { name, grads, m, v, model, updates: 0, groups })
    }

    /// Forgets the gradients.
    pub fn zero_grads(&mut self) {
        self.grads.flat_mut().host().fill(0.0);
    }

    /// Norm of all gradients.
    ///
    /// # Errors
    /// [`Error::BadNumber`] naming the tensor if a gradient is not finite.
    pub fn gradient_norm(&self, dev: &Device, step: u64) -> Result<f64> {
        let norm = grad_norm::norm(dev, self.grads.flat())?.get()?;
        if norm.is_finite() { Ok(norm) } else { Err(self.bad(dev, "gradient", norm, step)) }
    }

    /// Clips the gradients, whose norm is `norm`, updates the weights and renews what is derived from
    /// them.
    ///
    /// # Errors
    /// [`Error::BadNumber`] naming the tensor if a weight is not finite any more: a step too large.
    pub fn update(
        &mut self,
        dev: &Device,
        s: &Settings,
        lr: f64,
        norm: f64,
        step: u64,
    ) -> Result<()> {
        self.updates += 1;
        let scale = grad_norm::clip_scale(norm, s.max_grad_norm);
        let hyper = Hyper {
            learning_rate: lr,
            beta1: s.beta1,
            beta2: s.beta2,
            epsilon: s.epsilon,
            weight_decay: s.weight_decay,
        };
        let state = adamw::State {
            p: self.model.params_mut().flat_mut(),
            m: self.m.flat_mut(),
            v: self.v.flat_mut(),
            copy: None,
        };
        // Group 0, which decays, reaches to the end if there is no other.
        let groups = self.groups.view();
        let groups = if s.decay_all { groups.range(0..1) } else { groups };
        adamw::step(dev, state, self.grads.flat(), groups, scale, self.updates, &hyper)?;
        if grad_norm::first_bad(dev, self.model.params().flat())?.get()?.is_some() {
            return Err(self.bad(dev, "new weight", f64::NAN, step));
        }
        self.model.repack(dev)
    }

    /// An error about the first gradient or weight that is not finite; `whole` is for finite numbers
    /// whose squares overflow: they have no first culprit.
    fn bad(&self, dev: &Device, what: &str, whole: f64, step: u64) -> Error {
        let all = if what == "gradient" { &self.grads } else { self.model.params() };
        let at = match grad_norm::first_bad(dev, all.flat()).and_then(Later::get) {
            Ok(at) => at,
            Err(e) => return e,
        };
        let tensor = at.and_then(|i| models::tensor_at(&self.model, i));
        let tensor = tensor.unwrap_or_else(|| "all tensors".into());
        let value = at.map_or(whole, |i| f64::from(all.flat().host()[i]));
        let what = format!("the {what} of {tensor} of the {} model", self.name);
        Error::BadNumber { step, what, value, samples: Vec::new(), places: Vec::new() }
    }
}

/// Where runs of tensors begin that decay, then do not, and so on, in lines of the flat buffer.
fn groups(layout: &Layout) -> Vec<u32> {
    let mut starts = vec![0];
    for t in layout.tensors() {
        // An odd number of starts: the last group decays.
        if t.slot.is_matrix() != (starts.len() % 2 == 1) {
            starts.push((t.offset / adamw::LINE) as u32);
        }
    }
    starts
}
