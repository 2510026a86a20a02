//! The models of a run. [`ROLES`] says each role once; one loop each plans, loads, scores, hashes,
//! saves and exports whatever roles a run has.

use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::{
    adapters::{self, BaseKey, ModelUse},
    settings::Settings,
};
use crate::{
    algorithms::{Columns, Needs, Origin},
    data::Sequence,
    device::{Buffer, Device, Element, Pending},
    digest::hex,
    error::{Error, Result},
    models::{
        self, Batch, Config, Head, Layout, LoadOptions, Master, Model, Params, Residency, Spec,
        load_as,
    },
    ops::{
        adamw::{self, Hyper},
        grad_norm,
    },
    rollout::ScoringPass,
};

type ColumnOf = fn(&mut Columns<f32>) -> &mut Vec<f32>;

/// A purpose that a run has for a model.
#[derive(Debug)]
pub struct Role {
    /// Names it in plans, checkpoints and messages.
    pub name: &'static str,
    pub head: Head,
    /// The head reads the last token of a sequence, not every predicted one.
    pub last: bool,
    /// Where its weights come from, if the algorithm needs the role.
    from: fn(&Needs) -> Option<Origin>,
    /// The column that it fills before a step's updates.
    column: Option<ColumnOf>,
    /// None if the model is frozen.
    pub trained: Option<TrainedRole>,
}

/// Names of the results of a trained model.
#[derive(Debug)]
pub struct TrainedRole {
    /// The folder that it is exported to.
    pub folder: &'static str,
    /// The metric of its gradient's norm.
    pub norm: &'static str,
    /// The phase of its gradient, in a profile.
    pub phase: &'static str,
}

/// All roles, in the order in which models are trained and shown.
pub static ROLES: [Role; 5] = [
    Role {
        name: "policy",
        head: Head::Lm,
        last: false,
        from: |n| n.policy.then_some(Origin::Model),
        column: Some(|c| &mut c.old_logp),
        trained: Some(TrainedRole { folder: "final", norm: "grad_norm", phase: "policy gradient" }),
    },
    Role {
        name: "value",
        head: Head::Scalar,
        last: false,
        from: |n| n.scalar.filter(|_| n.policy).map(|s| s.from),
        column: Some(|c| &mut c.old_values),
        trained: Some(TrainedRole {
            folder: "final-value",
            norm: "value_grad_norm",
            phase: "value gradient",
        }),
    },
    Role {
        name: "reward",
        head: Head::Scalar,
        last: true,
        from: |n| n.scalar.filter(|_| !n.policy).map(|s| s.from),
        column: None,
        trained: Some(TrainedRole { folder: "final", norm: "grad_norm", phase: "reward gradient" }),
    },
    Role {
        name: "reference",
        head: Head::Lm,
        last: false,
        from: |n| match n.reference_model {
            Some(_) => n.reference.then_some(Origin::ReferenceModel),
            None => n.reference.then_some(Origin::Model),
        },
        column: Some(|c| &mut c.ref_logp),
        trained: None,
    },
    Role {
        name: "reward_model",
        head: Head::Scalar,
        last: true,
        from: |n| n.reward_model.as_ref().map(|_| Origin::RewardModel),
        column: Some(|c| &mut c.scores),
        trained: None,
    },
];

impl Role {
    /// Adds a sequence to a batch, with the rows that the head reads.
    pub fn push(&self, batch: &mut Batch, s: &Sequence) {
        if self.last {
            batch.push_last(&s.ids);
        } else {
            batch.push_masked(&s.ids, &s.predicted);
        }
    }
}

/// A model of a run before it is loaded.
#[derive(Clone, Debug)]
pub struct PlannedModel {
    pub role: &'static Role,
    pub dir: PathBuf,
    pub config: Config,
    /// The spec that it describes, not yet widened for a device.
    pub spec: Spec,
    /// Tokens of the longest sequence, once the data is known.
    longest: Option<usize>,
    from: Origin,
}

/// The models that an algorithm needs.
pub fn planned(s: &Settings, needs: &Needs) -> Result<Vec<PlannedModel>> {
    let mut first = true;
    let plan = |(role, from): (&'static Role, Origin)| {
        let named = match from {
            Origin::Model => None,
            Origin::RewardModel => needs.reward_model.clone(),
            Origin::ReferenceModel => needs.reference_model.clone(),
        };
        let dir = named.unwrap_or_else(|| PathBuf::from(&s.model));
        let (trained, own) = (role.trained.is_some(), from == Origin::Model);
        let of = ModelUse { trained, first: std::mem::take(&mut first), own };
        let config = adapters::with_adapter(s, Config::read(&dir)?, of)?;
        let (_, spec) = config.spec()?;
        Ok(PlannedModel { role, dir, config, spec, longest: None, from })
    };
    let all = ROLES.iter().filter_map(|role| Some((role, (role.from)(needs)?)));
    let all = all.map(plan).collect::<Result<Vec<_>>>()?;
    match all.first() {
        Some(first) if first.role.trained.is_some() => Ok(all),
        _ => Err(Error::value("an algorithm", "a model to train", "none")),
    }
}

impl PlannedModel {
    /// The same for sequences of up to `longest` tokens; what a user should know of it.
    pub fn for_sequences(&mut self, longest: usize) -> Result<Vec<String>> {
        let (config, mut notes) = (self.config.clone().for_sequences(longest), Vec::new());
        let (dir, (_, spec)) = (self.dir.display(), config.spec()?);
        let frequencies =
            |s: &Spec| -> Vec<_> { s.ropes.iter().map(|r| r.inv_freq(s.rotary_dim)).collect() };
        if frequencies(&spec) != frequencies(&self.spec) {
            notes.push(format!(
                "{dir}: its rotary positions depend on the longest sequence, which has {longest} \
                 tokens in this run"
            ));
        }
        if config.is_nested() {
            notes.push(format!("{dir}: its text part is read, all others are left out"));
        }
        (self.longest, self.spec, self.config) = (Some(longest), spec, config);
        Ok(notes)
    }

    fn options(&self, residency: Residency, new_head: Option<u64>) -> LoadOptions {
        LoadOptions { head: self.role.head, new_head, residency, longest: self.longest }
    }

    /// The weights that stay as they are and that it has in common with others: those below an
    /// adapter, or all of a frozen model beside such.
    pub fn shared(&self, all: &[Self]) -> Option<BaseKey> {
        let key = |m: &Self| {
            let stays = m.role.trained.is_none() || m.spec.adapter.is_some();
            stays.then(|| BaseKey::of(&m.config, &m.spec, m.role.head))
        };
        let own = key(self)?;
        let adapts = |m: &Self| m.spec.adapter.is_some() && key(m).as_ref() == Some(&own);
        all.iter().any(adapts).then_some(own)
    }

    /// The memory that holds its weights: host memory for a frozen model, if the settings ask for
    /// it and the gradients of the first of `all` models have room for them.
    pub fn residency<T: Element>(&self, dev: &Device, s: &Settings, all: &[Self]) -> Residency {
        let len = |m: &Self| Layout::trained(&m.spec.clone().on(dev), m.role.head).len();
        let room = all.first().map_or(0, |first| len(first) * size_of::<T::Acc>());
        match dev {
            _ if self.role.trained.is_some() => Residency::Trained,
            Device::Cuda(_)
                if s.offload_frozen
                    && self.shared(all).is_none()
                    && len(self) * size_of::<T>() <= room =>
            {
                Residency::Offloaded
            }
            _ => Residency::Frozen,
        }
    }
}

const FROZEN: Residency = Residency::Frozen;

/// The models of a run, loaded.
pub struct Models<T: Element> {
    pub trained: Vec<TrainState<T>>,
    pub frozen: Vec<(&'static Role, Model<T>)>,
}

impl<T: Element<Acc = f32>> Models<T> {
    /// Loads frozen models first: those that are offloaded then leave their memory to the others.
    pub fn load(dev: &Device, s: &Settings, all: &[PlannedModel]) -> Result<Self> {
        let (mut frozen, mut trained) = (Vec::new(), Vec::new());
        let mut bases: Vec<(BaseKey, Model<T>)> = Vec::new();
        let mut made = |m: &PlannedModel, residency, new_head| {
            m.config.adapter().map_or(Ok(()), |adapter| adapter.check_head(m.role.head))?;
            let Some(key) = m.shared(all) else {
                return load_as(dev, m.config.clone(), m.options(residency, new_head));
            };
            let found = bases.iter().position(|(known, _)| *known == key);
            let at = match found {
                Some(at) => at,
                None => {
                    let options = LoadOptions { head: key.head, ..m.options(FROZEN, None) };
                    bases.push((key, load_as(dev, m.config.base(), options)?));
                    bases.len() - 1
                }
            };
            bases[at].1.adapted(dev, m.config.clone(), m.role.head, residency)
        };
        for m in all.iter().filter(|m| m.role.trained.is_none()) {
            let mut model: Model<T> = made(m, FROZEN, None)?;
            if m.residency::<T>(dev, s, all) == Residency::Offloaded {
                model.offload(dev)?;
            }
            frozen.push((m.role, model));
        }
        for m in all.iter().filter(|m| m.role.trained.is_some()) {
            let new_head = m.role.head == Head::Scalar && m.from == Origin::Model;
            let new_head = new_head.then_some(s.seed);
            let model = made(m, Residency::Trained, new_head)?;
            trained.push(TrainState::new(dev, m.role, model)?);
        }
        Ok(Self { trained, frozen })
    }

    /// All roles and models.
    pub fn all(&self) -> impl Iterator<Item = (&'static Role, &Model<T>)> {
        let trained = self.trained.iter().map(|state| (state.role, &state.model));
        trained.chain(self.frozen.iter().map(|(role, model)| (*role, model)))
    }

    /// The model that is trained with this head.
    pub fn with_head(&self, head: Head) -> Option<&Model<T>> {
        self.trained.iter().map(|state| &state.model).find(|m| m.head() == head)
    }

    /// SHA-256 of the weights and specs of all models, by role.
    pub fn hashes(&self, dev: &Device) -> Result<Vec<(&'static str, String)>> {
        let hash = |(role, m): (&'static Role, &Model<T>)| {
            let mut digest = Sha256::new();
            let master = m.master();
            if let (Some(own), true) = (m.adapter(), master.is_err()) {
                digest.update(bytemuck::cast_slice::<T, u8>(&dev.on_host(own.flat())?));
            }
            if m.adapter().is_some() || master.is_err() {
                digest.update(bytemuck::cast_slice::<T, u8>(&m.on_host(dev)?));
            }
            if let Ok(w) = master {
                digest.update(bytemuck::cast_slice::<f32, u8>(&dev.on_host(w)?));
            }
            // Weights alone do not tell how far a rotation turns.
            digest.update(format!("{:?}", m.spec()));
            Ok((role.name, hex(digest.finalize())))
        };
        self.all().map(hash).collect()
    }

    /// Fills each column that a role has and that the source left empty.
    pub fn fill(
        &mut self,
        pass: &mut ScoringPass<'_>,
        needs: &Needs,
        sequences: &[Sequence],
        c: &mut Columns<f32>,
    ) -> Result<()> {
        let dev = pass.dev;
        for state in &self.trained {
            let asked = state.role.head != Head::Lm || needs.old_logp;
            if let Some(column) = state.role.column.filter(|_| asked)
                && column(c).is_empty()
            {
                let _phase = dev.span("score");
                let (role, model) = (state.role, (&state.model, needs.temperature()));
                pass.run(model, sequences, |batch, s| role.push(batch, s), column(c), None)?;
            }
        }
        // Offloaded weights come into the memory of gradients, which are of the last step.
        let Some(first) = self.trained.first_mut() else { return Ok(()) };
        for (role, model) in &mut self.frozen {
            let Some(column) = role.column else { continue };
            let _phase = dev.span("score");
            model.with_loaded(dev, &mut first.grads, |model| {
                let model = (model, needs.temperature());
                pass.run(model, sequences, |batch, s| role.push(batch, s), column(c), None)
            })?;
        }
        Ok(())
    }
}

/// A trained model and its optimizer.
#[derive(Debug)]
pub struct TrainState<T: Element> {
    pub role: &'static Role,
    /// The model, and the f32 weights that updates change.
    pub model: Model<T>,
    /// Gradients of the present step.
    pub grads: Params<T::Acc>,
    pub m: Params<T::Acc>,
    pub v: Params<T::Acc>,
    pub updates: u64,
    /// Groups of weights that decay or not, as [`adamw::step`] wants them.
    groups: Buffer<'static, u32>,
}

impl<T: Element> TrainState<T> {
    /// A model at the start of its training.
    pub fn new(dev: &Device, role: &'static Role, model: Model<T>) -> Result<Self> {
        let layout = model.trained().clone();
        let zeros = || Params::zeros(dev, "moments", &layout);
        let (grads, m, v) = (Params::gradients(dev, &layout)?, zeros()?, zeros()?);
        let groups = Buffer::of(dev, "groups of weights", &groups(&layout))?;
        Ok(Self { role, grads, m, v, model, updates: 0, groups })
    }

    pub fn zero_grads(&mut self, dev: &Device) -> Result<()> {
        self.grads.zero(dev)
    }

    /// Norm of all gradients, for [`TrainState::known`].
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
    /// from them. Returns the first weight that is no longer finite, for [`TrainState::healthy`].
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
        let (m, v) = (self.m.flat_mut(), self.v.flat_mut());
        let state = adamw::State { p: weights, m, v, copy, t: self.updates };
        // Group 0, which decays, reaches to the end if there is no other.
        let groups = self.groups.view();
        let groups = if s.decay_all { groups.range(0..1) } else { groups };
        adamw::step(dev, state, self.grads.flat(), groups, scale, &hyper)?;
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
        let layout = self.model.trained();
        let tensor = at.and_then(|i| models::tensor_at(&self.model, layout, i));
        let tensor = tensor.unwrap_or_else(|| "all tensors".into());
        let what = format!("the {what} of {tensor} of the {} model", self.role.name);
        Error::BadNumber { step, what, value, samples: Vec::new(), places: Vec::new() }
    }
}

/// Bytes that [`TrainState::new`] takes, beside the model's, by what they hold.
pub fn bytes<T: Element>(spec: &Spec, head: Head) -> [(&'static str, usize); 3] {
    let layout = Layout::trained(spec, head);
    let each = layout.len() * size_of::<T::Acc>();
    let groups = groups(&layout).len() * size_of::<u32>();
    let tokens = layout.tied_len() * size_of::<T::Acc>();
    [("gradients", each + tokens), ("moments", 2 * each), ("groups of weights", groups)]
}

/// Starts of the groups of tensors that decay, do not decay, and so on in turn, in lines of the
/// flat buffer.
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
