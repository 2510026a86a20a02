//! A model that can run: spec, weights, and what is derived from them.

use std::{any::TypeId, borrow::Cow, sync::Arc};

use half::bf16;
use safetensors::Dtype;

use super::{
    Config, Family, Head, Layout, Norm, ParamKind, ParamTensor, Params, QkNorm, QueryScale, Spec,
    axis::Axis,
    linear::{Linear, PackedWeights},
    norm::NormLayer,
};
use crate::{
    device::{Buffer, Device, Element, Float, View, ViewMut, reserve},
    error::{Error, Result},
    ops::{matmul::Weight, norm::NormSpec, rope},
    rng::{Philox, Purpose},
};

/// Where a model's weights are and what else is kept with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    Frozen,
    /// Frozen, and in host memory between its passes ([`Model::offload`]).
    Offloaded,
    /// With f32 weights beside those that it computes with, if these are bf16.
    Trained,
}

/// The flat weights that an optimizer writes.
#[derive(Debug)]
pub struct Master<'a, F> {
    /// The weights of [`Model::master`].
    pub weights: ViewMut<'a, F>,
    /// Their bf16 copy, if the model computes with one.
    pub copy: Option<ViewMut<'a, bf16>>,
}

/// A transformer with its head, which computes in `T`: f32 or f64 on the CPU, bf16 on a CUDA
/// device. Only this file knows how the weights are kept; all else asks for a [`Linear`], a
/// `NormLayer` or a tensor.
#[derive(Debug)]
pub struct Model<T: Element> {
    family: &'static Family,
    config: Config,
    spec: Spec,
    head: Head,
    /// What its weights were stored in.
    pub(super) stored: Dtype,
    params: Params<T>,
    /// The f32 weights that `params` are rounded from.
    master: Option<Params<T::Acc>>,
    /// The weights while they are in host memory.
    offloaded: Option<Vec<T>>,
    packed: PackedWeights<T>,
    /// One for each of [`Spec::ropes`].
    ropes: Vec<rope::Table<T::Acc>>,
    /// Of [`Spec::query_scale`].
    query_scale: Option<rope::Table<T::Acc>>,
}

impl<T: Element> Model<T> {
    /// A model of `config` with all weights 0, to be filled through [`Model::params_mut`].
    pub fn zeros(dev: &Device, config: Config, head: Head, residency: Residency) -> Result<Self> {
        let (family, spec) = config.spec()?;
        let spec = spec.on(dev);
        spec.check(dev)?;
        let layout = Arc::new(Layout::new(&spec, head));
        let master = (rounded::<T>() && residency == Residency::Trained)
            .then(|| Params::zeros(dev, "f32 weights", &layout))
            .transpose()?;
        let params = Params::zeros(dev, "weights", &layout)?;
        let packed = PackedWeights::new(dev, &layout)?;
        let widths = (spec.rotary_dim, spec.head_dim);
        let table = |r| rope::Table::wide(dev, r, widths, spec.max_positions);
        let ropes = spec.ropes.iter().map(table).collect::<Result<_>>()?;
        let scaling = |q: QueryScale| {
            rope::Table::scaling(dev, spec.head_dim, spec.max_positions, |p| q.at(p))
        };
        let query_scale = spec.query_scale.map(scaling).transpose()?;
        Ok(Self {
            family,
            config,
            head,
            stored: Dtype::F32,
            params,
            master,
            offloaded: None,
            packed,
            ropes,
            query_scale,
            spec,
        })
    }

    /// The sizes and parts of its transformer, as the device computes it.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The head on its backbone.
    pub fn head(&self) -> Head {
        self.head
    }

    /// The family that `model_type` in its `config.json` names.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// The `config.json` it came from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What its weights were stored in: f32 for a model that was never loaded.
    pub fn stored_dtype(&self) -> Dtype {
        self.stored
    }

    /// The weights that it computes with.
    pub fn params(&self) -> &Params<T> {
        &self.params
    }

    /// The weights once more as the CPU multiplies by them, each with the tensor that it is of.
    pub fn panels(&self) -> impl Iterator<Item = (&ParamTensor, View<'_, T>)> {
        let layout = self.params.layout();
        let tensor = |at: &(ParamKind, Option<usize>)| {
            layout.tensors().iter().find(|t| (t.kind, t.layer) == *at)
        };
        self.packed.all().filter_map(move |(at, p)| Some((tensor(at)?, p.view())))
    }

    /// The layout of the weights that updates change, and so of gradients and moments: today all.
    pub fn trained(&self) -> &Arc<Layout> {
        self.params.layout()
    }

    /// The weights to write, in a model without f32 weights. Call [`Model::repack`] before the next
    /// forward pass.
    pub fn params_mut(&mut self) -> &mut Params<T> {
        &mut self.params
    }

    /// The weights that an update changes, flat: [`Model::params`] themselves, or the f32 ones that
    /// those are rounded from.
    pub fn master(&self) -> Result<View<'_, T::Acc>> {
        match &self.master {
            Some(master) => Ok(master.flat()),
            None => self.params.flat().float(),
        }
    }

    /// The same to write.
    pub fn master_mut(&mut self) -> Result<Master<'_, T::Acc>> {
        match &mut self.master {
            // bf16 is the one type that is rounded.
            Some(master) => {
                let copy = Some(self.params.flat_mut().cast());
                Ok(Master { weights: master.flat_mut(), copy })
            }
            None => Ok(Master { weights: self.params.flat_mut().float()?, copy: None }),
        }
    }

    /// Replaces the weights of [`Model::master`], and what is derived from them.
    pub fn set_master(&mut self, dev: &Device, weights: &[T::Acc]) -> Result<()> {
        if let Some(master) = &mut self.master {
            dev.write(master.flat_mut(), weights)?;
        }
        let own: Vec<T> = weights.iter().map(|w| T::of(w.f64())).collect();
        dev.write(self.params.flat_mut(), &own)?;
        self.repack(dev)
    }

    /// Moves the weights of a frozen model from a GPU to host memory until
    /// [`Model::with_loaded`] needs them. A model on the CPU is there already.
    pub fn offload(&mut self, dev: &Device) -> Result<()> {
        if let (Device::Cuda(_), None) = (dev, &self.offloaded) {
            self.offloaded = Some(dev.read(self.params.flat())?);
            self.params.data = Buffer::none();
        }
        Ok(())
    }

    /// Runs `work` with the model. Offloaded weights overwrite `room` for as long as it takes.
    pub fn with_loaded<R>(
        &mut self,
        dev: &Device,
        room: &mut Params<T::Acc>,
        work: impl FnOnce(&Self) -> Result<R>,
    ) -> Result<R> {
        const WHAT: &str = "offloaded weights, in the gradients' memory";
        let Some(weights) = &self.offloaded else { return work(self) };
        let (len, have) = (room.data.len(), room.data.len() * size_of::<T::Acc>());
        let want = weights.len() * size_of::<T>();
        if want > have {
            return Err(Error::Memory { what: WHAT, want, have });
        }
        let data = std::mem::replace(&mut room.data, Buffer::none());
        self.params.data = data.reuse(WHAT, weights.len())?;
        let done = dev.write(self.params.flat_mut(), weights).and_then(|()| work(self));
        let data = std::mem::replace(&mut self.params.data, Buffer::none());
        room.data = data.reuse(WHAT, len)?;
        done
    }

    /// The weights that it computes with, in host memory.
    pub fn on_host<'a>(&'a self, dev: &Device) -> Result<Cow<'a, [T]>> {
        match &self.offloaded {
            Some(weights) => Ok(weights.into()),
            None => dev.on_host(self.params.flat()),
        }
    }

    /// Renews what is derived from the weights after they changed.
    pub fn repack(&mut self, dev: &Device) -> Result<()> {
        self.packed.pack(dev, &self.params)
    }

    /// Writes one tensor, in f32 too where the model has f32 weights.
    pub(super) fn write(
        &mut self,
        dev: &Device,
        t: &ParamTensor,
        weights: &[T::Acc],
    ) -> Result<()> {
        if let Some(master) = &mut self.master {
            dev.write(master.tensor_mut(t), weights)?;
        }
        let mut own = reserve("a tensor to load", weights.len())?;
        own.extend(weights.iter().map(|w| T::of(w.f64())));
        dev.write(self.params.tensor_mut(t), &own)
    }

    pub(super) fn linear(
        &self,
        dev: &Device,
        kind: ParamKind,
        layer: Option<usize>,
    ) -> Result<Linear<'_, T>> {
        let at = self.params.need(kind, layer)?;
        let (weight, bias) = (self.params.tensor(at), self.params.bias(at));
        let packed = match self.packed.get(at) {
            Some(packed) => packed.into(),
            None => Weight::stack(dev, weight, at.stack, at.sides())?,
        };
        let room = if kind == ParamKind::Router { self.spec.router_room() } else { at.rows };
        let wide = self.params.flat().range(at.offset..at.offset + room * at.cols);
        Ok(Linear { at, weight, wide, packed, bias })
    }

    pub(super) fn query_scale(&self) -> Option<&rope::Table<T::Acc>> {
        self.query_scale.as_ref()
    }

    pub(super) fn rope(&self, i: usize) -> &rope::Table<T::Acc> {
        &self.ropes[i]
    }

    pub(super) fn norm(&self, kind: ParamKind, layer: Option<usize>) -> Result<NormLayer<'_, T>> {
        let at = self.params.need(kind, layer)?;
        let (weight, bias) = (self.params.tensor(at), self.params.bias(at));
        let Spec { norm, norm_eps: eps, norm_one_plus: one_plus, .. } = self.spec;
        let (heads, width) = match kind {
            ParamKind::QNorm => (self.spec.q_heads, Some(Axis::NormedQ)),
            ParamKind::KNorm => (self.spec.kv_heads, Some(Axis::NormedK)),
            _ => (1, None),
        };
        let heads = if self.spec.qk_norm == Some(QkNorm::Heads) { heads } else { 1 };
        if let (ParamKind::DeltaNorm, Some(shape)) = (kind, self.spec.delta()) {
            let (norm, heads) = (Norm::Rms, shape.value_heads);
            let unpadded = Some(self.spec.widths().value_dim);
            let spec = NormSpec { norm, one_plus: false, eps, heads, unpadded };
            return Ok(NormLayer { at, weight, bias, spec });
        }
        let unpadded = width.map(|axis| axis.stored_len(&self.spec));
        let norm = if width.is_some() { Norm::Rms } else { norm };
        let spec = NormSpec { norm, one_plus, eps, heads, unpadded };
        Ok(NormLayer { at, weight, bias, spec })
    }

    /// The LM head `[vocab, hidden]`.
    pub fn lm_head(&self, dev: &Device) -> Result<Linear<'_, T>> {
        let head = self.params.layout().lm_head();
        let head = head.ok_or_else(|| Error::value("head", "an LM head", "a scalar head"))?;
        self.linear(dev, head.kind, None)
    }

    /// The LM head as stored logits are made with it: a CUDA device adds rows of 0 up to a multiple
    /// of 8, whose logits mean nothing.
    pub(super) fn logit_head(&self, dev: &Device) -> Result<Weight<'_, T>> {
        let Linear { at, packed, .. } = self.lm_head(dev)?;
        let (rows, cols) = (self.spec.vocab_room(), at.cols);
        if rows == at.rows {
            return Ok(packed);
        }
        let padded = self.params.flat().range(at.offset..at.offset + rows * cols);
        Weight::rows(dev, padded, (rows, cols))
    }

    /// The weight of the scalar head `[hidden]`.
    pub fn score_head(&self) -> Result<View<'_, T>> {
        let score = self.params.get(ParamKind::Score, None);
        score.ok_or_else(|| Error::value("head", "a scalar head", "an LM head"))
    }
}

/// Bytes that [`Model::zeros`] takes for a model of this spec, which is the device's, by what they
/// hold.
pub fn bytes<T: Element>(
    dev: &Device,
    spec: &Spec,
    head: Head,
    residency: Residency,
) -> Vec<(&'static str, usize)> {
    let layout = Layout::new(spec, head);
    let len = layout.len();
    let mut all = Vec::new();
    if residency != Residency::Offloaded {
        all.push(("weights", len * size_of::<T>()));
    }
    if rounded::<T>() && residency == Residency::Trained {
        all.push(("f32 weights", len * size_of::<T::Acc>()));
    }
    if let Device::Cpu(_) = dev {
        all.push(("packed weights", PackedWeights::<T>::bytes(dev, &layout)));
    }
    if !spec.ropes.is_empty() {
        all.push(("rotary table", spec.rope_bytes(size_of::<T::Acc>())));
    }
    all
}

/// Whether numbers in `T` are rounded from f32.
fn rounded<T: Element>() -> bool {
    TypeId::of::<T>() != TypeId::of::<T::Acc>()
}

/// A new scalar head.
pub(super) fn new_score<F: Float>(cols: usize, seed: u64) -> Vec<F> {
    let draw = Philox::new(seed, 0, 0, Purpose::Init);
    let std = 1.0 / ((cols + 1) as f64).sqrt();
    (0..cols).map(|i| F::of(std * draw.normal(i as u32))).collect()
}
