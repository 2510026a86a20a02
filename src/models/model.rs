//! A model that can run: spec, weights, and what is derived from them.

use std::{path::Path, sync::Arc};

use super::{Config, Family, Layout, Params, Position, Slot, Spec, weights};
use crate::{
    device::{Device, Float, View},
    error::{Error, Result},
    ops::{matmul::Packed, rope},
};

/// What stands on the trunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The next token's distribution: policy and reference.
    Lm,
    /// One number a position: value and reward.
    Scalar,
}

/// Weights of a block's linear layers, packed for the forward product.
#[derive(Debug)]
pub(super) struct PackedBlock<F: 'static> {
    pub qkv: Packed<F>,
    pub out: Packed<F>,
    pub up: Packed<F>,
    pub down: Packed<F>,
}

/// A transformer with its head.
#[derive(Debug)]
pub struct Model<F: Float> {
    pub(super) family: &'static Family,
    pub(super) config: Config,
    pub(super) spec: Spec,
    pub(super) head: Head,
    pub(super) params: Params<F>,
    pub(super) blocks: Vec<PackedBlock<F>>,
    pub(super) lm: Option<Packed<F>>,
    pub(super) rope: Option<rope::Table<F>>,
}

impl<F: Float> Model<F> {
    /// A model of `config` with all weights 0, to be filled through [`Model::params_mut`].
    ///
    /// # Errors
    /// [`Error::File`] if the config is unknown or wrong, [`Error::Memory`] if there is no room.
    pub fn zeros(dev: &Device, config: Config, head: Head) -> Result<Self> {
        dev.on_cpu("a model")?;
        let (family, spec) = config.spec()?;
        let params = Params::zeros(dev, "weights", &Arc::new(Layout::new(&spec, head)))?;
        let h = spec.hidden;
        let block = |_| {
            Ok(PackedBlock {
                qkv: Packed::new(dev, spec.qkv_cols(), h)?,
                out: Packed::new(dev, h, spec.attention_cols())?,
                up: Packed::new(dev, spec.up_cols(), h)?,
                down: Packed::new(dev, h, spec.mlp_hidden)?,
            })
        };
        let rope = match &spec.position {
            Position::Rope(r) => Some(rope::Table::new(dev, r, spec.head_dim, spec.max_positions)?),
            Position::Learned => None,
        };
        Ok(Self {
            family,
            config,
            head,
            params,
            blocks: (0..spec.layers).map(block).collect::<Result<_>>()?,
            lm: (head == Head::Lm).then(|| Packed::new(dev, spec.vocab, h)).transpose()?,
            rope,
            spec,
        })
    }

    /// Loads a Hugging Face folder; see [`super::load`].
    ///
    /// # Errors
    /// Those of [`super::load`].
    pub fn load(dev: &Device, dir: &Path, head: Head, new_head: Option<u64>) -> Result<Self> {
        weights::load(dev, dir, head, new_head)
    }

    /// The spec.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The head.
    #[must_use]
    pub fn head(&self) -> Head {
        self.head
    }

    /// The family.
    #[must_use]
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// The `config.json` it came from.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The weights.
    #[must_use]
    pub fn params(&self) -> &Params<F> {
        &self.params
    }

    /// The weights, to write. Call [`Model::repack`] before the next forward pass.
    #[must_use]
    pub fn params_mut(&mut self) -> &mut Params<F> {
        &mut self.params
    }

    /// Renews the packed copies after the weights changed.
    ///
    /// # Errors
    /// None that a caller could cause; shapes come from the layout.
    pub fn repack(&mut self, dev: &Device) -> Result<()> {
        for (l, block) in self.blocks.iter_mut().enumerate() {
            for (slot, packed) in [
                (Slot::Qkv, &mut block.qkv),
                (Slot::Out, &mut block.out),
                (Slot::Up, &mut block.up),
                (Slot::Down, &mut block.down),
            ] {
                packed.pack(dev, need(&self.params, slot, Some(l))?)?;
            }
        }
        if let Some(lm) = &mut self.lm {
            let slot = if self.spec.tied { Slot::Embedding } else { Slot::LmHead };
            lm.pack(dev, need(&self.params, slot, None)?)?;
        }
        Ok(())
    }

    /// A copy with another head: a value model from a policy or a reward model, a reference from a
    /// policy. A head of the same kind is copied; a new scalar head is drawn as
    /// [`super::load`] says.
    ///
    /// # Errors
    /// [`Error::Value`] if an LM head is wanted and this model has none.
    pub fn copy_as(&self, dev: &Device, head: Head, seed: u64) -> Result<Self> {
        let mut copy = Self::zeros(dev, self.config.clone(), head)?;
        for t in copy.params.layout().clone().tensors() {
            if let Some(from) = self.params.get(t.slot, t.layer) {
                copy.params.tensor_mut(t).host().copy_from_slice(from.host());
            } else if t.slot == Slot::Score {
                weights::init_score(copy.params.tensor_mut(t).host(), seed);
            } else {
                let got = format!("a model without {}", t.name());
                return Err(Error::value("model", "one with an LM head", got));
            }
        }
        copy.repack(dev)?;
        Ok(copy)
    }

    /// The matrix of the LM head `[vocab, hidden]` and its packed form.
    ///
    /// # Errors
    /// [`Error::Value`] if the head is a scalar.
    pub fn lm_head(&self) -> Result<(View<'_, F>, &Packed<F>)> {
        let slot = self.lm_slot();
        match &self.lm {
            Some(packed) => Ok((need(&self.params, slot, None)?, packed)),
            None => Err(Error::value("head", "an LM head", "a scalar head")),
        }
    }

    /// Where the LM head's weight is.
    #[must_use]
    pub fn lm_slot(&self) -> Slot {
        if self.spec.tied { Slot::Embedding } else { Slot::LmHead }
    }

    /// The weight of the scalar head `[hidden]`.
    ///
    /// # Errors
    /// [`Error::Value`] if the head is an LM head.
    pub fn score_head(&self) -> Result<View<'_, F>> {
        let score = self.params.get(Slot::Score, None);
        score.ok_or_else(|| Error::value("head", "a scalar head", "an LM head"))
    }
}

/// A weight that the layout promises.
pub(super) fn need<F: Float>(
    params: &Params<F>,
    slot: Slot,
    layer: Option<usize>,
) -> Result<View<'_, F>> {
    let missing = || Error::value("weights", format!("{slot:?} of block {layer:?}"), "none");
    params.get(slot, layer).ok_or_else(missing)
}
