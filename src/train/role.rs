//! A model that is trained: its weights, gradients and moments.

use super::settings::Settings;
use crate::{
    device::{Buffer, Device, Element, Pending},
    error::{Error, Result},
    models::{self, Head, Layout, Master, Model, Params, Spec},
    ops::{
        adamw::{self, Hyper},
        grad_norm,
    },
};

/// A trained model and its optimizer.
#[derive(Debug)]
pub struct Role<T: Element> {
    /// `policy`, `value` or `reward`: names its tensors in checkpoints and messages.
    pub name: &'static str,
    /// The model, and the f32 weights that updates change.
    pub model: Model<T>,
    /// Gradients of the present step.
    pub grads: Params<T::Acc>,
    pub m: Params<T::Acc>,
    pub v: Params<T::Acc>,
    pub updates: u64,
    /// Which weights decay, as [`adamw::step`] wants it.
    groups: Buffer<'static, u32>,
}

impl<T: Element> Role<T> {
    /// A model at the start of its training.
    pub fn new(dev: &Device, name: &'static str, model: Model<T>) -> Result<Self> {
        let layout = model.trained().clone();
        let zeros = |what| Params::zeros(dev, what, &layout);
        let (grads, m, v) = (zeros("gradients")?, zeros("moments")?, zeros("moments")?);
        let groups = Buffer::of(dev, "groups of weights", &groups(&layout))?;
        Ok(Self { name, grads, m, v, model, updates: 0, groups })
    }

    pub fn zero_grads(&mut self, dev: &Device) -> Result<()> {
        self.grads.zero(dev)
    }

    /// Norm of all gradients, for [`Role::known`].
    pub fn gradient_norm(&self, dev: &Device) -> Result<Pending<f64>> {
        grad_norm::norm(dev, self.grads.flat())
    }

    /// The same once it is there.
    ///
    /// # Errors
    /// [`Error::BadNumber`] naming the tensor if a gradient is not finite.
    pub fn known(&self, dev: &Device, norm: Pending<f64>, step: u64) -> Result<f64> {
        let norm = norm.get()?;
        if norm.is_finite() { Ok(norm) } else { Err(self.bad(dev, "gradient", norm, step)) }
    }

    /// Clips the gradients, whose norm is `norm`, updates the weights and renews what is derived
    /// from them. Returns the first weight that is not finite any more, for [`Role::healthy`].
    pub fn update(
        &mut self,
        dev: &Device,
        s: &Settings,
        lr: f64,
        norm: f64,
    ) -> Result<Pending<Option<usize>>> {
        self.updates += 1;
        let scale = grad_norm::clip_scale(norm, s.max_grad_norm);
        let hyper = Hyper {
            learning_rate: lr,
            beta1: s.beta1,
            beta2: s.beta2,
            epsilon: s.epsilon,
            weight_decay: s.weight_decay,
        };
        let Master { weights, copy } = self.model.master_mut()?;
        let state = adamw::State { p: weights, m: self.m.flat_mut(), v: self.v.flat_mut(), copy };
        // Group 0, which decays, reaches to the end if there is no other.
        let groups = self.groups.view();
        let groups = if s.decay_all { groups.range(0..1) } else { groups };
        adamw::step(dev, state, self.grads.flat(), groups, scale, self.updates, &hyper)?;
        self.model.repack(dev)?;
        grad_norm::first_bad(dev, self.model.master()?)
    }

    /// Whether all weights are numbers after updates.
    ///
    /// # Errors
    /// [`Error::BadNumber`] naming the tensor if one is not: a step too large.
    pub fn healthy(&self, dev: &Device, bad: Pending<Option<usize>>, step: u64) -> Result<()> {
        match bad.get()? {
            None => Ok(()),
            Some(_) => Err(self.bad(dev, "new weight", f64::NAN, step)),
        }
    }

    /// An error about the first gradient or weight that is not finite; `whole` is for finite
    /// numbers whose squares overflow: they have no first culprit.
    fn bad(&self, dev: &Device, what: &str, whole: f64, step: u64) -> Error {
        let find = || {
            let all = if what == "gradient" { self.grads.flat() } else { self.model.master()? };
            let at = grad_norm::first_bad(dev, all)?.get()?;
            let value = at.map(|i| dev.read(all.range(i..i + 1))).transpose()?;
            Ok((at, value.map_or(whole, |v| v[0].f64())))
        };
        let (at, value) = match find() {
            Ok(found) => found,
            Err(e) => return e,
        };
        let tensor = at.and_then(|i| models::tensor_at(&self.model, i));
        let tensor = tensor.unwrap_or_else(|| "all tensors".into());
        let what = format!("the {what} of {tensor} of the {} model", self.name);
        Error::BadNumber { step, what, value, samples: Vec::new(), places: Vec::new() }
    }
}

/// Bytes that [`Role::new`] takes, beside the model's, by what they hold.
pub fn bytes<T: Element>(spec: &Spec, head: Head) -> [(&'static str, usize); 3] {
    let layout = Layout::new(spec, head);
    let each = layout.len() * size_of::<T::Acc>();
    let groups = groups(&layout).len() * size_of::<u32>();
    [("gradients", each), ("moments", 2 * each), ("groups of weights", groups)]
}

/// Where runs of tensors begin that decay, then do not, and so on, in lines of the flat buffer.
fn groups(layout: &Layout) -> Vec<u32> {
    let mut starts = vec![0];
    for t in layout.tensors() {
        // An odd number of starts: the last group decays.
        if t.facts.decays != (starts.len() % 2 == 1) {
            starts.push((t.offset / adamw::LINE) as u32);
        }
    }
    starts
}
