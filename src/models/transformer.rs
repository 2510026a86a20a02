//! The one transformer: every family, every role, forward and backward; training, prefill and
//! decoding are the same forward pass over different rows.
//!
//! Blocks: `m = x + r post1(out(attention(norm1(x))))`, `y = m + r post2(down(act(up(norm2(m)))))`;
//! a family has the norms before, those after, or all of them, a factor `r` or none, and in
//! parallel blocks `norm2(x)` for `norm2(m)`. Rows are packed: sequences lie back to back, nothing
//! is padded. A row's bits depend on its own sequence only, so the log-prob of a token is the same
//! number whenever and with whomever it is computed. Some blocks have experts in the place of
//! the MLP, or beside it.

use super::{
    Activations, BatchRows, Cache, Model, ParamKind, Params, block::BlockPass,
    norm::NormInputGradient,
};
use crate::{
    device::{Device, Element, View, ViewMut},
    error::{Error, Result},
    ops::{embedding, scale},
};

impl<T: Element> Model<T> {
    /// Runs the blocks over `rows`, then the final norm over those that a head reads, as a norm
    /// works row by row. Results stay in `acts`, new keys and values go to `cache`.
    pub fn forward(
        &self,
        dev: &Device,
        rows: &BatchRows<'_>,
        acts: &mut Activations<'_, T>,
        cache: &mut Cache<'_, T>,
    ) -> Result<()> {
        self.embed(dev, rows, acts.x[0].view_mut())?;
        let (streams, kept) = (acts.x.len(), acts.blocks.len());
        for l in 0..self.spec().layers {
            let (from, to) = if streams == 1 { (0, 0) } else { (l, l + 1) };
            let (block, b) = (self.block(dev, rows, l), &mut acts.blocks[l.min(kept - 1)]);
            let last = cache.layers.len() - 1;
            let kv = &mut cache.layers[l.min(last)];
            block.attention(b, acts.x[from].view(), kv, &mut acts.room)?;
            block.expand(b, acts.x[from].view(), &mut acts.room)?;
            block.contract(b, acts.x[to].view_mut(), &mut acts.room)?;
        }
        let Activations { x, input, .. } = acts;
        let Some(x) = x.last() else {
            return Err(Error::value("activations", "at least one stream", 0));
        };
        embedding::forward(dev, input.x.view_mut(), rows.selected, x.view(), false)?;
        self.norm(ParamKind::FinalNorm, None)?.forward(dev, &mut input.norm, input.x.view())
    }

    fn embed(&self, dev: &Device, rows: &BatchRows<'_>, mut x: ViewMut<'_, T>) -> Result<()> {
        let table = self.params().tensor(self.params().need(ParamKind::Embedding, None)?);
        embedding::forward(dev, x.reborrow(), rows.ids, table, false)?;
        let factor = self.spec().scales.embedding;
        if factor != 1.0 {
            scale::in_place(dev, x.reborrow(), factor, None)?;
        }
        if let Some(table) = self.params().get(ParamKind::Positions, None) {
            embedding::forward(dev, x, rows.positions, table, true)?;
        }
        Ok(())
    }

    fn block<'a>(&'a self, dev: &'a Device, rows: &'a BatchRows<'a>, l: usize) -> BlockPass<'a, T> {
        BlockPass { dev, model: self, rows, at: Some(l), spec: self.spec().layer(l) }
    }

    /// Adds to `grads` the gradient of all weights but the head's, given `dh` `[selected, hidden]`,
    /// the gradient of the hidden states that [`Model::forward`] left in `acts`. Every segment must
    /// be a whole sequence, from position 0. After [`Keep::Streams`](super::Keep::Streams) blocks
    /// are computed again, to the same bits, and `cache` is written.
    pub fn backward(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        rows: &BatchRows<'_>,
        acts: &mut Activations<'_, T>,
        cache: &mut Cache<'_, T>,
        dh: View<'_, T>,
    ) -> Result<()> {
        let hidden = self.spec().hidden;
        let Activations { x, blocks, room, input, gradients } = acts;
        let Some(g) = gradients else {
            return Err(Error::value("backward pass", "activations that were kept", "none"));
        };
        let (dx, scratch_rows) = (g.dselected.view_mut(), g.scratch.view_mut());
        let out = NormInputGradient { dx, add: false, scratch: scratch_rows };
        let norm = self.norm(ParamKind::FinalNorm, None)?;
        norm.backward(dev, grads, out, dh, input.x.view(), &input.norm)?;
        dev.zero(g.dx.view_mut())?;
        let (dx, d, order) = (g.dx.view_mut(), g.dselected.view(), g.order.view_mut());
        embedding::scatter(dev, dx, order, rows.selected, d, hidden)?;
        for l in (0..self.spec().layers).rev() {
            let kept = blocks.len() == self.spec().layers;
            let (block, b) = (self.block(dev, rows, l), &mut blocks[if kept { l } else { 0 }]);
            let (x, after) = x.split_at_mut(l + 1);
            let x = x[l].view();
            if !kept {
                block.attention(b, x, &mut cache.layers[0], room)?;
                block.expand(b, x, room)?;
                if b.post2.is_some() {
                    block.contract(b, after[0].view_mut(), room)?;
                }
            }
            block.backward(grads, b, x, g, room)?;
        }
        let factor = self.spec().scales.embedding;
        let (dx, order) = (g.dx.view(), &mut g.order);
        if let Some(d) = grads.get_mut(ParamKind::Positions, None) {
            embedding::backward(dev, d, order.view_mut(), rows.positions, dx, hidden)?;
        }
        if factor != 1.0 {
            scale::in_place(dev, g.dx.view_mut(), factor, None)?;
        }
        if let Some(d) = grads.tokens_mut() {
            embedding::backward(dev, d, order.view_mut(), rows.ids, g.dx.view(), hidden)?;
        }
        Ok(())
    }
}
