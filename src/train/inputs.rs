//! A run's validated inputs: settings, specs, tokenizer, data; no weights yet.

use super::{
    data_file::DataFile,
    mixture::SourceFiles,
    models::{self, PlannedModel},
    observer::{Observer, Silent},
    plan::{MemoryPlan, PassSizes},
    schedule::Course,
    settings::Settings,
    source::Source,
};
use crate::{
    algorithms::{Algorithm, Needs},
    config::Section,
    data::{self, FolderPart, Limits, Sequence, Tokenizer},
    device::{Device, Element},
    error::{Error, Result},
    eval,
    models::Spec,
    rollout::rewards::Rewards,
};

/// A run without its weights.
pub struct RunInputs {
    pub settings: Settings,
    pub algorithm: Box<dyn Algorithm>,
    pub needs: Needs,
    pub models: Vec<PlannedModel>,
    /// The tokenizer beside the model.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that end a text.
    pub eos: Vec<u32>,
    /// Training data.
    pub source: Source,
    /// Evaluation data.
    pub held_out: Option<Source>,
    /// What scores samples beside the reward model.
    pub rewards: Rewards,
    /// What a user should know of them.
    pub warnings: Vec<String>,
    pub steps: u64,
    /// Of the learning rate.
    pub course: Course,
    pub sizes: PassSizes,
}

/// Tokens that a text or a prompt of this run may have.
pub fn max_length(s: &Settings, needs: &Needs, spec: &Spec) -> Result<usize> {
    let room = match s.max_length {
        0 => spec.max_positions,
        n => n.min(spec.max_positions),
    };
    if room < 2 {
        return Err(Error::config("max_length", "2 or more, or 0", s.max_length));
    }
    let new = needs.sampling().map_or(0, |s| s.max_new_tokens);
    room.checked_sub(new).filter(|n| *n > 0).ok_or_else(|| {
        let want = format!("less than the {room} positions of a prompt and its sample");
        Error::config("max_new_tokens", want, new)
    })
}

/// Says that prompts end before what the template writes in front of an answer.
pub fn unasked(opening: &str) -> String {
    format!(
        "the chat template ignores add_generation_prompt: the model has to write {opening:?} itself"
    )
}

/// What a run reads beside its models.
pub struct RunData {
    /// The tokenizer beside the model.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that end a text.
    pub eos: Vec<u32>,
    /// Training data.
    pub source: Source,
    /// Evaluation data.
    pub held_out: Option<Source>,
    /// What scores samples beside the reward model.
    pub rewards: Rewards,
}

impl RunData {
    /// Reads tokenizer and data for a policy of this spec. An answer of a conversation ends as its
    /// template ends it, and so does a sample.
    pub fn read(
        settings: &Settings,
        needs: &Needs,
        spec: &Spec,
        seen: &mut dyn Observer,
    ) -> Result<Self> {
        let dir = &settings.text_folder()?;
        let tokenizer = Tokenizer::open_if_there(dir, settings.chat_template.as_deref())?;
        let rewards = Rewards::new(&needs.rewards)?;
        if rewards.read_texts() && tokenizer.is_none() {
            let want = "a model folder with tokenizer.json: rewards read texts";
            return Err(Error::config("rewards", want, dir.display()));
        }
        let mut eos: Vec<u32> = settings.eos_id.into_iter().collect();
        if eos.is_empty() {
            eos.extend(tokenizer.iter().flat_map(|t| t.eos().to_vec()));
        }
        if settings.load_balance > 0.0 && spec.experts.is_none() {
            let want = "0 for a model without experts";
            return Err(Error::config("load_balance", want, settings.load_balance));
        }
        let max_length = max_length(settings, needs, spec)?;
        let (given, split) = (settings.eval_data.join(", "), settings.validation_split);
        if needs.sampling().is_some() {
            let want = "none for an algorithm that samples; its metrics are of new samples";
            let config = |key: &str, got: &str| Err(Error::config(key, want, got));
            if !given.is_empty() {
                return config("eval_data", &given);
            }
            if split > 0.0 {
                return config("validation_split", &split.to_string());
            }
        }
        if split > 0.0 && !given.is_empty() {
            let want = format!("0 beside eval_data, which is {given}");
            return Err(Error::config("validation_split", want, split));
        }
        let (vocab, eos_id) = (spec.vocab, eos.first().copied());
        let limits = Limits { max_length, vocab, eos: eos_id, skip_bad: 0 };
        let chats = tokenizer.as_ref().is_some_and(|t| t.template().is_ok());
        let find = |files: &[DataFile], part| {
            SourceFiles::find(files, part, chats, rewards.columns(), settings)
        };
        let mut load = |files: &SourceFiles| {
            Source::of(files, needs, tokenizer.as_ref(), limits, (settings, &mut *seen))
        };
        let mut files = find(&settings.data, FolderPart::Training)?;
        let apart = (split > 0.0).then(|| files.hold_out(split, settings.seed));
        let mut source = load(&files)?;
        let prompts = if needs.rewards.is_empty() { 0..0 } else { 0..source.data.len() };
        for i in prompts {
            let refused = |e: String| source.data.place_of(i).error(e);
            rewards.admit(&source.data.columns(i)).map_err(refused)?;
        }
        if needs.reference && needs.reference_model.is_none() && settings.begins_with_adapter() {
            source.warnings.push(
                "the reference is the model below the adapter that the run begins with; for the one \
                 with it set `reference_model` to the adapter's folder"
                    .into(),
            );
        }
        let end = tokenizer.as_ref().and_then(data::turn_end);
        let ended = |s: Sequence| s.ids.iter().any(|id| eos.contains(id));
        let learns = source.is_chat && needs.sampling().is_none();
        if learns && end.is_none() && !source.data.sequences().any(ended) {
            source.warnings.push(
                "the chat template ends an answer with text, not with a token: no answer will \
                 end by itself; take another template, or give its marks to the tokenizer"
                    .into(),
            );
        }
        if source.is_chat && needs.sampling().is_some() {
            let opening = tokenizer.as_ref().and_then(data::unasked_opening);
            source.warnings.extend(opening.as_deref().map(unasked));
        }
        if let (true, Some(end)) = (source.is_chat, end) {
            let first = usize::from(settings.eos_id.is_some());
            eos.retain(|id| *id != end || settings.eos_id == Some(end));
            if !eos.contains(&end) {
                eos.insert(first, end);
            }
        }
        let ids = |key: &str, ids: &[u32]| {
            let bad = ids.iter().find(|id| **id as usize >= spec.vocab);
            let want = format!("below the vocabulary of {}", spec.vocab);
            bad.map_or(Ok(()), |id| Err(Error::config(key, want, id)))
        };
        ids("eos_id", &eos)?;
        ids("stop_ids", &settings.stop_ids)?;
        let held_out = match (apart, settings.eval_data.is_empty()) {
            (None, true) => None,
            (Some(files), _) => Some(load(&files)?),
            (None, false) => {
                let files: Vec<DataFile> = settings.eval_data.iter().map(DataFile::from).collect();
                Some(load(&find(&files, FolderPart::HeldOut)?)?)
            }
        };
        Ok(Self { tokenizer, eos, source, held_out, rewards })
    }
}

impl RunInputs {
    /// Reads config, tokenizer and data.
    pub fn new(settings: Settings, algorithm: Box<dyn Algorithm>) -> Result<Self> {
        Self::seen_by(&mut Silent, settings, algorithm)
    }

    /// [`RunInputs::new`], of which `seen` hears how far it is.
    pub fn seen_by(
        seen: &mut dyn Observer,
        mut settings: Settings,
        algorithm: Box<dyn Algorithm>,
    ) -> Result<Self> {
        settings.validate()?;
        let needs = algorithm.needs();
        let mut models = models::planned(&settings, &needs)?;
        let spec = &models[0].spec;
        let data = RunData::read(&settings, &needs, spec, seen)?;
        let RunData { tokenizer, eos, source, held_out, rewards } = data;
        let longest = held_out.as_ref().map_or(0, |s| s.data.longest());
        let per_prompt = needs.sampling().map_or(1, |s| s.samples_per_prompt);
        if !settings.batch_size.is_multiple_of(per_prompt.saturating_mul(needs.minibatches)) {
            let parts = needs.minibatches;
            let want =
                format!("a multiple of samples_per_prompt {per_prompt} x minibatches {parts}");
            return Err(Error::config("batch_size", want, settings.batch_size));
        }
        let mut warnings = source.warnings.clone();
        warnings.extend(held_out.iter().flat_map(|s| s.warnings.clone()));
        let (asked, draws) = (settings.batch_size, source.draws() * per_prompt);
        if draws < asked {
            warnings.push(format!(
                "batch_size is {asked}, an epoch has {draws} examples: a step takes each once"
            ));
            settings.batch_size = draws;
        }
        let sizes = PassSizes::new(&settings, &needs, source.data.longest(), longest);
        let most = sizes.longest.max(sizes.held_out);
        for m in models.iter().filter(|m| m.dir != models[0].dir) {
            let tokenizer = tokenizer.as_ref();
            eval::check_reward_model(&m.dir, &m.spec, spec, tokenizer, most)?;
        }
        for m in &mut models {
            for note in m.for_sequences(most)? {
                if !warnings.contains(&note) {
                    warnings.push(note);
                }
            }
        }
        let steps = match settings.steps {
            0 => {
                let exact = settings.epochs * source.epoch() as f64 / source.draws() as f64;
                // 0.07 * 100 is above 7 by a rounding.
                (exact * (1.0 - 1e-12)).ceil().max(1.0) as u64
            }
            n => n,
        };
        let course = Course::new(&settings, steps)?;
        Ok(Self {
            settings,
            course,
            algorithm,
            needs,
            models,
            tokenizer,
            eos,
            source,
            held_out,
            rewards,
            warnings,
            steps,
            sizes,
        })
    }

    /// Its memory on `dev`, with models that compute in `T`.
    pub fn plan<T: Element>(&self, dev: &Device) -> Result<MemoryPlan> {
        MemoryPlan::new::<T>(dev, &self.settings, &self.needs, &self.sizes, &self.models)
    }
}
