//! A model that can run: spec, weights, and what is derived from them.

use std::{any::TypeId, borrow::Cow, path::Path, sync::Arc};

use half::bf16;

use super::{Config, Family, Layout, ParamKind, Params, Position, Spec, weights};
use crate::{
    device::{Buffer, Device, Element, View, ViewMut},
    error::{Error, Result},
    ops::{
        matmul::{Packed, Weight},
        rope,
    },
};

/// What stands on the backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The next token's distribution: policy and reference.
    Lm,
    /// One number a position: value and reward.
    Scalar,
}

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    Frozen,
    /// To compute with now and then, for a plan: made as a frozen one, its weights then wait in
    /// host memory ([`Model::offload`]).
    Offloaded,
    /// To be trained: where it computes in bf16, its weights are also kept in f32.
    Trained,
}

/// What an update of a model writes, flat.
#[derive(Debug)]
pub struct Master<'a, F> {
    /// The weights of [`Model::master`].
    pub weights: ViewMut<'a, F>,
    /// What is rounded from them, if the model computes with that.
    pub copy: Option<ViewMut<'a, bf16>>,
}

/// Weights of a block's linear layers, packed for the forward product on the CPU.
#[derive(Debug)]
struct PackedBlock<T: 'static> {
    qkv: Packed<T>,
    out: Packed<T>,
    up: Packed<T>,
    down: Packed<T>,
}

/// A transformer with its head, which computes in `T`: f32 or f64 on the CPU, bf16 on a CUDA
/// device.
#[derive(Debug)]
pub struct Model<T: Element> {
    pub(super) family: &'static Family,
    pub(super) config: Config,
    pub(super) spec: Spec,
    pub(super) head: Head,
    pub(super) params: Params<T>,
    /// What `params` are rounded from.
    pub(super) master: Option<Params<T::Acc>>,
    /// The weights, if they wait in host memory.
    offloaded: Option<Vec<T>>,
    /// None on a CUDA device, which multiplies by weights as they are.
    blocks: Vec<PackedBlock<T>>,
    lm: Option<Packed<T>>,
    pub(super) rope: Option<rope::Table<T::Acc>>,
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
        let (mut blocks, mut lm) = (Vec::new(), None);
        if let Device::Cpu(_) = dev {
            let [qkv, out, up, down] = sides(&spec);
            let new = |(n, k)| Packed::new(dev, n, k);
            for _ in 0..spec.layers {
                let (qkv, out, up, down) = (new(qkv)?, new(out)?, new(up)?, new(down)?);
                blocks.push(PackedBlock { qkv, out, up, down });
            }
            lm = (head == Head::Lm).then(|| new((spec.vocab, spec.hidden))).transpose()?;
        }
        let widths = (spec.stored().head_dim, spec.head_dim);
        let rope = match &spec.position {
            Position::Rope(r) => Some(rope::Table::wide(dev, r, widths, spec.max_positions)?),
            Position::Learned => None,
        };
        Ok(Self { family, config, head, params, master, offloaded: None, blocks, lm, rope, spec })
    }

    /// Loads a Hugging Face folder to compute with; see [`super::load`].
    pub fn load(dev: &Device, dir: &Path, head: Head, new_head: Option<u64>) -> Result<Self> {
        weights::load(dev, dir, head, new_head, Residency::Frozen)
    }

    /// Loads a Hugging Face folder to train it; see [`super::load`].
    pub fn load_trained(
        dev: &Device,
        dir: &Path,
        head: Head,
        new_head: Option<u64>,
    ) -> Result<Self> {
        weights::load(dev, dir, head, new_head, Residency::Trained)
    }

    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    pub fn head(&self) -> Head {
        self.head
    }

    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// The `config.json` it came from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The weights that it computes with.
    pub fn params(&self) -> &Params<T> {
        &self.params
    }

    /// The weights, to write, where they are no copies of others. Call [`Model::repack`] before the
    /// next forward pass.
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

    /// What an update writes.
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

    /// Takes these for the weights of [`Model::master`].
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

    /// Does `work` with the model; offloaded weights lie in the memory of `room` meanwhile, whose
    /// numbers are lost.
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

    /// Renews the packed copies after the weights changed: on the CPU; there are none elsewhere.
    pub fn repack(&mut self, dev: &Device) -> Result<()> {
        for (l, block) in self.blocks.iter_mut().enumerate() {
            for (kind, packed) in [
                (ParamKind::Qkv, &mut block.qkv),
                (ParamKind::Out, &mut block.out),
                (ParamKind::Up, &mut block.up),
                (ParamKind::Down, &mut block.down),
            ] {
                packed.pack(dev, need(&self.params, kind, Some(l))?)?;
            }
        }
        let kind = self.lm_kind();
        if let Some(lm) = &mut self.lm {
            lm.pack(dev, need(&self.params, kind, None)?)?;
        }
        Ok(())
    }

    /// A copy with another head: a value model from a policy or a reward model, a reference from a
    /// policy. A head of the same kind is copied; a new scalar head is drawn as
    /// [`super::load`] says.
    pub fn copy_as(
        &self,
        dev: &Device,
        head: Head,
        seed: u64,
        residency: Residency,
    ) -> Result<Self> {
        let mut copy = Self::zeros(dev, self.config.clone(), head, residency)?;
        for t in copy.params.layout().clone().tensors() {
            if let Some(from) = self.params.get(t.kind, t.layer) {
                dev.copy(copy.params.tensor_mut(t), from)?;
                if let Some(master) = &mut copy.master {
                    let to = master.tensor_mut(t);
                    match self.master.as_ref().and_then(|m| m.get(t.kind, t.layer)) {
                        Some(from) => dev.copy(to, from)?,
                        None => {
                            let wide = |x: &T| <T::Acc as Element>::of(x.f64());
                            dev.write(to, &dev.read(from)?.iter().map(wide).collect::<Vec<_>>())?;
                        }
                    }
                }
            } else if t.kind == ParamKind::Score {
                copy.write(dev, t, &weights::new_score(t.cols, seed))?;
            } else {
                let got = format!("a model without {}", t.name());
                return Err(Error::value("model", "one with an LM head", got));
            }
        }
        copy.repack(dev)?;
        Ok(copy)
    }

    /// Writes one tensor, and what it is rounded from.
    pub(super) fn write(
        &mut self,
        dev: &Device,
        t: &super::Tensor,
        weights: &[T::Acc],
    ) -> Result<()> {
        if let Some(master) = &mut self.master {
            dev.write(master.tensor_mut(t), weights)?;
        }
        let own: Vec<T> = weights.iter().map(|w| T::of(w.f64())).collect();
        dev.write(self.params.tensor_mut(t), &own)
    }

    /// A weight of a block's linear layers as the forward product reads it.
    pub(super) fn linear(&self, dev: &Device, kind: ParamKind, l: usize) -> Result<Weight<'_, T>> {
        if let Some(block) = self.blocks.get(l) {
            let packed = match kind {
                ParamKind::Qkv => &block.qkv,
                ParamKind::Out => &block.out,
                ParamKind::Up => &block.up,
                _ => &block.down,
            };
            return Ok(packed.into());
        }
        self.rows(dev, kind, Some(l))
    }

    fn rows(&self, dev: &Device, kind: ParamKind, layer: Option<usize>) -> Result<Weight<'_, T>> {
        let sides = self.params.layout().find(kind, layer).map_or((0, 0), |t| (t.rows, t.cols));
        Weight::rows(dev, need(&self.params, kind, layer)?, sides)
    }

    /// The matrix of the LM head `[vocab, hidden]`, and as the forward product reads it.
    pub fn lm_head(&self, dev: &Device) -> Result<(View<'_, T>, Weight<'_, T>)> {
        if self.head != Head::Lm {
            return Err(Error::value("head", "an LM head", "a scalar head"));
        }
        let kind = self.lm_kind();
        let w = need(&self.params, kind, None)?;
        match &self.lm {
            Some(packed) => Ok((w, packed.into())),
            None => Ok((w, self.rows(dev, kind, None)?)),
        }
    }

    /// The LM head as [`matmul::forward`] makes logits with it: on a CUDA device with rows of 0 up
    /// to a multiple of 8, whose logits mean nothing.
    pub fn logit_head(&self, dev: &Device) -> Result<Weight<'_, T>> {
        let (_, head) = self.lm_head(dev)?;
        let (rows, cols) = (self.spec.vocab_room(), self.spec.hidden);
        let Some(t) = self.params.layout().find(self.lm_kind(), None) else { return Ok(head) };
        if rows == t.rows {
            return Ok(head);
        }
        Weight::rows(dev, self.params.flat().range(t.offset..t.offset + rows * cols), (rows, cols))
    }

    /// Where the LM head's weight is.
    pub fn lm_kind(&self) -> ParamKind {
        if self.spec.tied { ParamKind::Embedding } else { ParamKind::LmHead }
    }

    /// The weight of the scalar head `[hidden]`.
    pub fn score_head(&self) -> Result<View<'_, T>> {
        let score = self.params.get(ParamKind::Score, None);
        score.ok_or_else(|| Error::value("head", "a scalar head", "an LM head"))
    }
}

/// Bytes that [`Model::zeros`] takes for a model of this spec, as `dev` computes it, by what they
/// hold.
pub fn bytes<T: Element>(
    dev: &Device,
    spec: &Spec,
    head: Head,
    residency: Residency,
) -> Vec<(&'static str, usize)> {
    let len = Layout::new(spec, head).len();
    let mut all = Vec::new();
    if residency != Residency::Offloaded {
        all.push(("weights", len * size_of::<T>()));
    }
    if rounded::<T>() && residency == Residency::Trained {
        all.push(("f32 weights", len * size_of::<T::Acc>()));
    }
    if let Device::Cpu(_) = dev {
        let packed = |(n, k)| Packed::<T>::bytes(dev, n, k);
        let blocks = spec.layers * sides(spec).map(packed).iter().sum::<usize>();
        let lm = if head == Head::Lm { packed((spec.vocab, spec.hidden)) } else { 0 };
        all.push(("packed weights", blocks + lm));
    }
    if let Position::Rope(_) = spec.position {
        all.push(("rotary table", spec.max_positions * spec.head_dim * size_of::<T::Acc>()));
    }
    all
}

/// Whether `T` holds what is rounded from f32.
fn rounded<T: Element>() -> bool {
    TypeId::of::<T>() != TypeId::of::<T::Acc>()
}

/// Outputs and inputs of the linear layers of a block: Qkv, Out, Up, Down.
fn sides(spec: &Spec) -> [(usize, usize); 4] {
    let (h, att) = (spec.hidden, spec.attention_cols());
    [(spec.qkv_cols(), h), (h, att), (spec.up_cols(), h), (h, spec.mlp_hidden)]
}

/// A weight that the layout promises.
pub(super) fn need<T: Element>(
    params: &Params<T>,
    kind: ParamKind,
    layer: Option<usize>,
) -> Result<View<'_, T>> {
    let missing = || Error::value("weights", format!("{kind:?} of block {layer:?}"), "none");
    params.get(kind, layer).ok_or_else(missing)
}
