//! Loads models: a folder of weights, or an adapter's and its base; adds adapters to their bases.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::{
    AdapterConfig, AdapterSpec, AdapterStart, Config, FactorSide, Head, LoadOptions, Model,
    ParamKind, Residency, adapter_tensor,
    model::new_score,
    weights::{copy, load_base, no_safetensors},
};
use crate::{
    device::{Device, Element, file, reserve},
    error::{Error, Result},
    rng::{Philox, Purpose},
};

/// The weights of a PEFT folder.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// The folder of the tokenizer, chat template and record of a model, and perhaps of the `adapter`
/// that is put on it: the adapter's, if it has a tokenizer; the model's own; or the base's, where
/// the model's folder is an adapter's without one.
pub fn text_folder(dir: &Path, adapter: Option<&Path>) -> Result<PathBuf> {
    if let Some(adapter) = adapter.filter(|dir| dir.join("tokenizer.json").exists()) {
        return Ok(adapter.into());
    }
    if AdapterConfig::is_in(dir) && !dir.join("tokenizer.json").exists() {
        return Ok(Config::read(dir)?.dir().into());
    }
    Ok(dir.into())
}

impl<T: Element> Model<T> {
    /// Loads a Hugging Face folder to compute with; see [`load`].
    pub fn load(dev: &Device, dir: &Path, head: Head, new_head: Option<u64>) -> Result<Self> {
        load(dev, dir, LoadOptions { new_head, ..LoadOptions::frozen(head) })
    }

    /// Loads a Hugging Face folder to train it; see [`load`].
    pub fn load_trained(
        dev: &Device,
        dir: &Path,
        head: Head,
        new_head: Option<u64>,
    ) -> Result<Self> {
        let residency = Residency::Trained;
        load(dev, dir, LoadOptions { new_head, residency, ..LoadOptions::frozen(head) })
    }
}

/// Loads a model. Weights may be f32, f16 or bf16, with or without the family's prefix. A folder
/// with `adapter_config.json` and no `config.json` is an adapter's, and is loaded with its base.
///
/// A folder without `score.weight` has no scalar head. If one is wanted all the same, to be
/// trained, `new_head` is the seed with which it is drawn from N(0, 1/(hidden + 1)) (Stiennon et
/// al. 2020; the form that N+ and lm-human-preferences use: standard deviation 1/sqrt(hidden + 1)).
///
/// # Errors
/// [`Error::Io`] and [`Error::File`], naming file and tensor: missing, of the wrong shape or
/// dtype, not finite, or unknown (a tensor that would be ignored is a model that is misread).
pub fn load<T: Element>(dev: &Device, dir: &Path, options: LoadOptions) -> Result<Model<T>> {
    load_as(dev, Config::read(dir)?, options)
}

/// [`load`] of a config that was read, with the adapter that it may have been given.
pub fn load_as<T: Element>(dev: &Device, config: Config, options: LoadOptions) -> Result<Model<T>> {
    let config = match options.longest {
        Some(longest) => config.for_sequences(longest),
        None => config,
    };
    let LoadOptions { head, residency, new_head, .. } = options;
    if config.adapter().is_none() {
        return load_base(dev, config, options);
    }
    config.adapter().map_or(Ok(()), |adapter| adapter.check_head(head))?;
    // The head that an adapter brings.
    let own = config.spec()?.1.adapter.is_some_and(|adapter| adapter.score);
    let new_head = new_head.or(own.then_some(0));
    let frozen = LoadOptions { residency: Residency::Frozen, new_head, ..options };
    load_base::<T>(dev, config.base(), frozen)?.adapted(dev, config, head, residency)
}

impl<T: Element> Model<T> {
    /// A model over the weights of this one with the adapter of `config`, which begins as that
    /// says.
    pub fn adapted(
        &self,
        dev: &Device,
        config: Config,
        head: Head,
        residency: Residency,
    ) -> Result<Self> {
        let mut model = self.over(dev, config.clone(), head, residency)?;
        let Some(adapter) = config.adapter() else { return Ok(model) };
        if residency == Residency::Trained {
            adapter.check_trained()?;
            let score = model.trained().find(ParamKind::Score, None);
            if head == Head::Scalar && score.is_none() {
                return Err(adapter.wrong("modules_to_save", "[\"score\"] to train it"));
            }
        }
        match &adapter.start {
            AdapterStart::Folder(dir) => model.read_adapter(dev, dir)?,
            AdapterStart::Seed(seed) => model.draw_adapter(dev, self, *seed)?,
        }
        model.repack(dev)?;
        Ok(model)
    }

    fn read_adapter(&mut self, dev: &Device, dir: &Path) -> Result<()> {
        let path = dir.join(ADAPTER_FILE);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            let message = "has its weights as adapter_model.bin, which runs code when it is read, \
                           wanted adapter_model.safetensors: peft's save_pretrained writes it";
            return Err(Error::file(dir, message));
        }
        let map = file::map(&path)?;
        let wrong = |e: String| Error::file(&path, e);
        let file = SafeTensors::deserialize(&map).map_err(|e| wrong(no_safetensors(&map, &e)))?;
        let mut left: Vec<String> = file.names().into_iter().map(str::to_owned).collect();
        for t in self.trained().clone().tensors() {
            let stored = adapter_tensor(self.family(), self.spec(), t);
            let name = &stored.name;
            let Ok(view) = file.tensor(name) else {
                return Err(wrong(format!("`{name}` is missing")));
            };
            if view.shape() != stored.shape {
                let (got, want) = (view.shape(), &stored.shape);
                return Err(wrong(format!("`{name}` has shape {got:?}, wanted {want:?}")));
            }
            left.retain(|other| other != name);
            let mut out = reserve("a tensor to load", t.len())?;
            out.resize(t.len(), <T::Acc as Element>::of(0.0));
            copy::<T>(&mut out, &stored.places, stored.rows, &view, None)
                .map_err(|e| wrong(format!("`{name}` {e}")))?;
            self.write(dev, t, &out)?;
        }
        match left.first() {
            None => Ok(()),
            Some(name) => {
                Err(wrong(format!("`{name}` is no tensor of the adapter that its config tells of")))
            }
        }
    }

    /// As PEFT's: A from U(-1/sqrt(inputs), 1/sqrt(inputs)) (He et al. 2015 with a = sqrt(5)), B 0;
    /// a scalar head as the base has it, or a new one.
    fn draw_adapter(&mut self, dev: &Device, base: &Self, seed: u64) -> Result<()> {
        for (i, t) in self.trained().clone().tensors().iter().enumerate() {
            let stored = adapter_tensor(self.family(), self.spec(), t);
            let all: Vec<T::Acc> = match t.factor.map(|f| f.side) {
                Some(FactorSide::B) => continue,
                Some(FactorSide::A) => {
                    let (draw, inputs) =
                        (Philox::new(seed, 0, 1 + i as u64, Purpose::Init), stored.shape[1]);
                    let bound = 1.0 / (inputs as f64).sqrt();
                    let mut all = vec![<T::Acc as Element>::of(0.0); t.len()];
                    for i in 0..stored.shape[0] * inputs {
                        let (r, c) = (i / inputs, i % inputs);
                        let at = stored.places.rows[r] * stored.places.stride;
                        let x = bound * (2.0 * f64::from(draw.uniform(i as u32)) - 1.0);
                        all[at + stored.places.cols[c]] = <T::Acc as Element>::of(x);
                    }
                    all
                }
                None => match base.params().get(ParamKind::Score, None) {
                    Some(score) => {
                        let own = dev.read(score)?;
                        own.iter().map(|x| <T::Acc as Element>::of(x.f64())).collect()
                    }
                    None => new_score(t.cols, seed),
                },
            };
            self.write(dev, t, &all)?;
        }
        Ok(())
    }

    /// The model with its adapter added to its weights, `W + s B A` in f64 with one rounding. The
    /// logits of both differ in bits: their sums are rounded elsewhere.
    ///
    /// # Errors
    /// [`Error::Value`] if the weights are shared, or kept in less than f32.
    pub fn merge(&mut self, dev: &Device) -> Result<()> {
        let Some(AdapterSpec { scale, .. }) = self.spec().adapter else { return Ok(()) };
        let own = dev.on_host(self.master()?)?.into_owned();
        let base = dev.on_host(self.params().flat().float()?)?;
        let (layout, trained) = (self.params().layout().clone(), self.trained().clone());
        let mut all = base.into_owned();
        for t in layout.tensors() {
            for [a, b] in trained.factors(t.kind, t.layer) {
                let (x, y) = (&own[a.range()], &own[b.range()]);
                let first = b.factor.map_or(0, |f| f.first);
                for (i, y) in y.chunks_exact(b.cols).enumerate() {
                    let row = &mut all[t.offset + (first + i) * t.cols..][..t.cols];
                    for (j, w) in row.iter_mut().enumerate() {
                        let terms = y.iter().enumerate();
                        let sum: f64 = terms.map(|(r, y)| y.f64() * x[r * a.cols + j].f64()).sum();
                        *w = <T::Acc as Element>::of(w.f64() + scale * sum);
                    }
                }
            }
        }
        if let (Some(to), Some(from)) =
            (layout.find(ParamKind::Score, None), trained.find(ParamKind::Score, None))
        {
            all[to.range()].copy_from_slice(&own[from.range()]);
        }
        self.without_adapter(dev, &all)
    }
}
