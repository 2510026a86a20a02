//! A model that can run: spec, weights, and what is derived from them.

use std::{any::TypeId, borrow::Cow, sync::Arc};

use half::bf16;
use safetensors::Dtype;

use super::{
    Config, Family, Head, Layout, Norm, ParamKind, ParamTensor, Params, QkNorm, QueryScale, Spec,
    adapter::{FactorWeight, LinearAdapter},
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
    /// Several models share it, each with an adapter of its own or none.
    base: Arc<Base<T>>,
    /// What is trained beside a base that is frozen.
    adapter: Option<WeightSet<T>>,
    /// The weights while they are in host memory.
    offloaded: Option<Vec<T>>,
}

/// The weights of a whole model, and the tables of its positions.
#[derive(Debug)]
struct Base<T: Element> {
    weights: WeightSet<T>,
    /// One for each of [`Spec::ropes`].
    ropes: Vec<rope::Table<T::Acc>>,
    /// Of [`Spec::query_scale`].
    query_scale: Option<rope::Table<T::Acc>>,
}

/// Weights, and what is derived from them.
#[derive(Debug)]
struct WeightSet<T: Element> {
    params: Params<T>,
    /// The f32 weights that `params` are rounded from.
    master: Option<Params<T::Acc>>,
    packed: PackedWeights<T>,
}

impl<T: Element> WeightSet<T> {
    fn zeros(dev: &Device, layout: Layout, residency: Residency) -> Result<Self> {
        let layout = Arc::new(layout);
        let master = (rounded::<T>() && residency == Residency::Trained)
            .then(|| Params::zeros(dev, "f32 weights", &layout))
            .transpose()?;
        if residency == Residency::Offloaded {
            let (params, packed) = (Params::none(&layout), PackedWeights::none());
            return Ok(Self { params, master, packed });
        }
        let params = Params::zeros(dev, "weights", &layout)?;
        let packed = PackedWeights::new(dev, &layout)?;
        Ok(Self { params, master, packed })
    }

    /// Bytes of the same, by what they hold.
    fn bytes(
        dev: &Device,
        layout: &Layout,
        residency: Residency,
    ) -> impl Iterator<Item = (&'static str, usize)> {
        let own = residency != Residency::Offloaded;
        let master = rounded::<T>() && residency == Residency::Trained;
        let packed = matches!(dev, Device::Cpu(_)).then(|| PackedWeights::<T>::bytes(dev, layout));
        [
            own.then_some(("weights", layout.len() * size_of::<T>())),
            master.then_some(("f32 weights", layout.len() * size_of::<T::Acc>())),
            packed.map(|bytes| ("packed weights", bytes)),
        ]
        .into_iter()
        .flatten()
    }

    /// A matrix as the forward product reads it.
    fn packed(&self, dev: &Device, t: &ParamTensor) -> Result<Weight<'_, T>> {
        match self.packed.get(t) {
            Some(packed) => Ok(packed.into()),
            None => Weight::stack(dev, self.params.tensor(t), t.stack, t.sides()),
        }
    }
}

impl<T: Element> Model<T> {
    /// A model of `config` with all weights 0, to be filled through [`Model::params_mut`]. Below an
    /// adapter there are none: such a model can be stored, not run.
    pub fn zeros(dev: &Device, config: Config, head: Head, residency: Residency) -> Result<Self> {
        if config.adapter().is_some() {
            let base = Self::zeros(dev, config.base(), head, Residency::Offloaded)?;
            return base.over(dev, config, head, residency);
        }
        let (family, spec) = config.spec()?;
        let spec = spec.on(dev);
        spec.check(dev)?;
        let weights = WeightSet::zeros(dev, Layout::new(&spec, head), residency)?;
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
            base: Arc::new(Base { weights, ropes, query_scale }),
            adapter: None,
            offloaded: None,
            spec,
        })
    }

    /// A model over the weights of this one, which nobody changes any more: with the adapter of
    /// `config`, whose factors are 0, or without one.
    pub fn over(
        &self,
        dev: &Device,
        config: Config,
        head: Head,
        residency: Residency,
    ) -> Result<Self> {
        if self.adapter.is_some() || self.offloaded.is_some() {
            return Err(Error::value("a base", "weights without an adapter", "others"));
        }
        let (family, spec) = config.spec()?;
        let spec = spec.on(dev);
        let layout = || Layout::trained(&spec, head);
        let adapter = spec.adapter.is_some().then(|| WeightSet::zeros(dev, layout(), residency));
        let (adapter, base) = (adapter.transpose()?, self.base.clone());
        Ok(Self { family, config, head, stored: self.stored, base, adapter, offloaded: None, spec })
    }

    /// The weights that updates change.
    fn own(&self) -> &WeightSet<T> {
        self.adapter.as_ref().unwrap_or(&self.base.weights)
    }

    fn own_mut(&mut self) -> Result<&mut WeightSet<T>> {
        match &mut self.adapter {
            Some(adapter) => Ok(adapter),
            None => Self::alone(&mut self.base),
        }
    }

    /// The weights of a base that no other model reads.
    fn alone(base: &mut Arc<Base<T>>) -> Result<&mut WeightSet<T>> {
        let shared = || Error::value("weights to write", "those of one model", "shared ones");
        Arc::get_mut(base).map(|base| &mut base.weights).ok_or_else(shared)
    }

    /// Whether both compute with the same weights below their adapters.
    pub fn shares_base(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.base, &other.base)
    }

    /// Drops an adapter whose weights have been added to those of a base that is this model's
    /// alone.
    pub(super) fn without_adapter(&mut self, dev: &Device, base: &[T::Acc]) -> Result<()> {
        self.config = self.config.base();
        (self.adapter, self.spec.adapter) = (None, None);
        self.set_master(dev, base)
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

    /// The weights that it computes with, without those of an adapter.
    pub fn params(&self) -> &Params<T> {
        &self.base.weights.params
    }

    /// The weights of its adapter, if it has one.
    pub fn adapter(&self) -> Option<&Params<T>> {
        self.adapter.as_ref().map(|adapter| &adapter.params)
    }

    /// The weights once more as the CPU multiplies by them, each with its layout and its tensor
    /// there.
    pub fn panels(&self) -> impl Iterator<Item = (&Layout, &ParamTensor, View<'_, T>)> {
        [Some(&self.base.weights), self.adapter.as_ref()].into_iter().flatten().flat_map(|set| {
            let layout = &**set.params.layout();
            set.packed.all().filter_map(move |(at, p)| Some((layout, layout.at(*at)?, p.view())))
        })
    }

    /// The layout of the weights that updates change, and so of gradients and moments: those of an
    /// adapter, or all.
    pub fn trained(&self) -> &Arc<Layout> {
        self.own().params.layout()
    }

    /// The weights to write, an adapter's if there is one, in a model without f32 weights. Call
    /// [`Model::repack`] before the next forward pass.
    ///
    /// # Errors
    /// [`Error::Value`] if other models share them.
    pub fn params_mut(&mut self) -> Result<&mut Params<T>> {
        self.own_mut().map(|own| &mut own.params)
    }

    /// The weights that an update changes, flat: [`Model::params`] themselves or an adapter's, or
    /// the f32 ones that those are rounded from.
    pub fn master(&self) -> Result<View<'_, T::Acc>> {
        let WeightSet { params, master, .. } = self.own();
        master.as_ref().map_or_else(|| params.flat().float(), |master| Ok(master.flat()))
    }

    /// The same to write.
    pub fn master_mut(&mut self) -> Result<Master<'_, T::Acc>> {
        let WeightSet { params, master, .. } = self.own_mut()?;
        match master {
            // bf16 is the one type that is rounded.
            Some(master) => {
                let copy = Some(params.flat_mut().cast());
                Ok(Master { weights: master.flat_mut(), copy })
            }
            None => Ok(Master { weights: params.flat_mut().float()?, copy: None }),
        }
    }

    /// Replaces the weights of [`Model::master`], and what is derived from them.
    pub fn set_master(&mut self, dev: &Device, weights: &[T::Acc]) -> Result<()> {
        let set = self.own_mut()?;
        if let Some(master) = &mut set.master {
            dev.write(master.flat_mut(), weights)?;
        }
        let own: Vec<T> = weights.iter().map(|w| T::of(w.f64())).collect();
        dev.write(set.params.flat_mut(), &own)?;
        self.repack(dev)
    }

    /// Moves the weights of a frozen model from a GPU to host memory until
    /// [`Model::with_loaded`] needs them. A model on the CPU is there already.
    pub fn offload(&mut self, dev: &Device) -> Result<()> {
        if let (Device::Cuda(_), None) = (dev, &self.offloaded) {
            let set = Self::alone(&mut self.base)?;
            self.offloaded = Some(dev.read(set.params.flat())?);
            set.params.data = Buffer::none();
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
        if self.offloaded.is_none() {
            return work(self);
        }
        let weights = self.offloaded.take().unwrap_or_default();
        let done = self.loaded(dev, &weights, room, work);
        self.offloaded = Some(weights);
        done
    }

    /// The same of offloaded `weights`.
    fn loaded<R>(
        &mut self,
        dev: &Device,
        weights: &[T],
        room: &mut Params<T::Acc>,
        work: impl FnOnce(&Self) -> Result<R>,
    ) -> Result<R> {
        const WHAT: &str = "offloaded weights, in the gradients' memory";
        let (len, have) = (room.data.len(), room.data.len() * size_of::<T::Acc>());
        let want = size_of_val(weights);
        if want > have {
            return Err(Error::Memory { what: WHAT, want, have });
        }
        let data = std::mem::replace(&mut room.data, Buffer::none());
        let params = &mut Self::alone(&mut self.base)?.params;
        params.data = data.reuse(WHAT, weights.len())?;
        let done = dev.write(params.flat_mut(), weights).and_then(|()| work(self));
        let params = &mut Self::alone(&mut self.base)?.params;
        let data = std::mem::replace(&mut params.data, Buffer::none());
        room.data = data.reuse(WHAT, len)?;
        done
    }

    /// The weights of [`Model::params`], in host memory.
    pub fn on_host<'a>(&'a self, dev: &Device) -> Result<Cow<'a, [T]>> {
        match &self.offloaded {
            Some(weights) => Ok(weights.into()),
            None => dev.on_host(self.params().flat()),
        }
    }

    /// Renews what is derived from the weights after they changed.
    pub fn repack(&mut self, dev: &Device) -> Result<()> {
        let WeightSet { params, packed, .. } = self.own_mut()?;
        packed.pack(dev, params)
    }

    /// Writes one tensor, in f32 too where the model has f32 weights.
    pub(super) fn write(
        &mut self,
        dev: &Device,
        t: &ParamTensor,
        weights: &[T::Acc],
    ) -> Result<()> {
        let set = self.own_mut()?;
        if let Some(master) = &mut set.master {
            dev.write(master.tensor_mut(t), weights)?;
        }
        let mut own = reserve("a tensor to load", weights.len())?;
        own.extend(weights.iter().map(|w| T::of(w.f64())));
        dev.write(set.params.tensor_mut(t), &own)
    }

    pub(super) fn linear(
        &self,
        dev: &Device,
        kind: ParamKind,
        layer: Option<usize>,
    ) -> Result<Linear<'_, T>> {
        let (set, params) = (&self.base.weights, self.params());
        let at = params.need(kind, layer)?;
        let (weight, bias) = (params.tensor(at), params.bias(at));
        let (packed, adapter) = (set.packed(dev, at)?, self.linear_adapter(dev, at)?);
        let room = if kind == ParamKind::Router { self.spec.router_room() } else { at.rows };
        let wide = params.flat().range(at.offset..at.offset + room * at.cols);
        Ok(Linear { at, weight, wide, packed, bias, adapter })
    }

    /// The adapters of a weight, if it has some.
    fn linear_adapter(
        &self,
        dev: &Device,
        at: &ParamTensor,
    ) -> Result<Option<LinearAdapter<'_, T>>> {
        let (Some(set), Some(spec)) = (&self.adapter, &self.spec.adapter) else { return Ok(None) };
        let factor = |at| {
            let (weight, packed) = (set.params.tensor(at), set.packed(dev, at)?);
            Ok(FactorWeight { at, weight, packed })
        };
        let all = set.params.layout().factors(at.kind, at.layer);
        let parts = all.map(|[a, b]| Ok([factor(a)?, factor(b)?])).collect::<Result<Vec<_>>>()?;
        let (scale, outputs) = (spec.scale, at.rows);
        Ok((!parts.is_empty()).then_some(LinearAdapter { parts, scale, outputs }))
    }

    pub(super) fn query_scale(&self) -> Option<&rope::Table<T::Acc>> {
        self.base.query_scale.as_ref()
    }

    pub(super) fn rope(&self, i: usize) -> &rope::Table<T::Acc> {
        &self.base.ropes[i]
    }

    pub(super) fn norm(&self, kind: ParamKind, layer: Option<usize>) -> Result<NormLayer<'_, T>> {
        let params = self.params();
        let at = params.need(kind, layer)?;
        let (weight, bias) = (params.tensor(at), params.bias(at));
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
        let head = self.params().layout().lm_head().filter(|_| self.head == Head::Lm);
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
        let padded = self.params().flat().range(at.offset..at.offset + rows * cols);
        Weight::rows(dev, padded, (rows, cols))
    }

    /// The weight of the scalar head `[hidden]`.
    pub fn score_head(&self) -> Result<View<'_, T>> {
        let own = self.adapter().and_then(|own| own.get(ParamKind::Score, None));
        let score = own.or_else(|| self.params().get(ParamKind::Score, None));
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
    let mut all: Vec<_> = WeightSet::<T>::bytes(dev, &layout, residency).collect();
    if !spec.ropes.is_empty() {
        all.push(("rotary table", spec.rope_bytes(size_of::<T::Acc>())));
    }
    all
}

/// Bytes that [`Model::over`] takes, by what they hold.
pub fn adapter_bytes<T: Element>(
    dev: &Device,
    spec: &Spec,
    head: Head,
    residency: Residency,
) -> Vec<(&'static str, usize)> {
    let layout = Layout::trained(spec, head);
    let bytes = WeightSet::<T>::bytes(dev, &layout, residency);
    let name = |what| match what {
        "weights" => "adapter",
        "f32 weights" => "f32 adapter",
        _ => "packed adapter",
    };
    bytes.map(|(what, bytes)| (name(what), bytes)).collect()
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
