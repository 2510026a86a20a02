//! `tokenizer.json`: text to ids and back.
//!
//! Text never becomes control: a text that spells a special token is encoded as the characters it
//! is made of.

mod validate;

use std::{
    cell::Cell,
    collections::BTreeSet,
    ops::Range,
    panic::{self, AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Once,
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::template::{BUILT_IN, ChatTemplate};
use crate::{
    device::file,
    digest::hex,
    error::{Error, Result},
};

/// A Hugging Face tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    /// SHA-256 of the file.
    digest: String,
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Vec<u32>,
    adds_bos: bool,
    /// Ids of the anchor that [`Tokenizer::encode_continuation`] strips, for tokenizers that put a
    /// space before every text.
    anchor: Option<Vec<u32>>,
    /// The added tokens, longer ones first.
    added: Vec<AddedToken>,
    /// Those that no message makes: special ones, and marks of the chat template.
    controls: Vec<AddedToken>,
    /// Text behind a special token is encoded as at the beginning of a text.
    begins_anew: bool,
    template: Option<ChatTemplate>,
}

/// A token that the tokenizer adds to those of its model, as texts spell it.
#[derive(Clone, Debug)]
struct AddedToken {
    text: String,
    id: u32,
    /// The tokenizer leaves it out of what it decodes.
    special: bool,
    /// It takes the white space on its left and on its right.
    strips: (bool, bool),
}

/// Tokens next to a cut of a text, whose own tokens may be others.
const SEAM: usize = 256;

/// Bytes that are encoded first for each token that is wanted.
const BYTES_PER_TOKEN: usize = 8;

/// A line break has a token of its own in every tokenizer that needs an anchor.
const ANCHOR: &str = "\n";

/// The side of a text that is kept where it is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Its beginning.
    First,
    /// Its end.
    Last,
}

/// Runs code of the library, which panics on some malformed files: then there is no result, and
/// nothing is printed.
fn caught<R>(run: impl FnOnce() -> R) -> Option<R> {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |about| {
            if !QUIET.get() {
                before(about);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(run));
    QUIET.set(false);
    result.ok()
}

impl Tokenizer {
    /// Opens the tokenizer of a model folder. BOS comes from `tokenizer_config.json`, else from
    /// `generation_config.json` and `config.json`; the first EOS likewise, and more from these.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let text = file::read_text(&path, 256 << 20)?;
        validate::validate(&text).map_err(|message| Error::file(&path, message))?;
        let mut inner = match caught(|| tokenizers::Tokenizer::from_bytes(text.as_bytes())) {
            Some(Ok(t)) => t,
            Some(Err(e)) => return Err(Error::file(path, format!("not a tokenizer: {e}"))),
            None => return Err(Error::file(path, "not a tokenizer: it cannot be parsed")),
        };
        if inner.get_pre_tokenizer().is_none() {
            // A word of the cache that each thread has would be a whole text.
            let mut model = inner.get_model().clone();
            model.resize_cache(0);
            inner.with_model(model);
        }
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        // Special tokens spelled in text stay text.
        inner.set_encode_special_tokens(true);
        let json = |name: &str| -> Value {
            let text = file::read_text(&dir.join(name), 16 << 20).unwrap_or_default();
            serde_json::from_str(&text).unwrap_or(Value::Null)
        };
        let settings = json("tokenizer_config.json");
        let (generation, model) = (json("generation_config.json"), json("config.json"));
        let named = |key: &str| {
            let v = &settings[key];
            let text = v.as_str().or_else(|| v["content"].as_str())?;
            inner.token_to_id(text)
        };
        let numbered = |key: &str| -> Vec<u32> {
            let list = |v: &Value| match v {
                Value::Array(all) => all.iter().filter_map(Value::as_u64).collect(),
                v => v.as_u64().into_iter().collect::<Vec<_>>(),
            };
            let ids = [&generation[key], &model[key]].map(list);
            let ids = if ids[0].is_empty() { &ids[1] } else { &ids[0] };
            ids.iter().filter_map(|id| u32::try_from(*id).ok()).collect()
        };
        let bos = named("bos_token").or_else(|| numbered("bos_token_id").first().copied());
        // What ends a text, then all else that ends a sample: Llama 3 has three, Qwen 3 two.
        let mut eos: Vec<u32> = named("eos_token").into_iter().collect();
        eos.extend(numbered("eos_token_id"));
        let mut seen = BTreeSet::new();
        eos.retain(|id| seen.insert(*id));
        let digest = hex(Sha256::digest(&text));
        let added = inner.get_added_tokens_decoder().into_iter();
        let added = added.filter(|(_, t)| !t.content.trim().is_empty()).map(|(id, t)| AddedToken {
            text: t.content,
            id,
            special: t.special,
            strips: (t.lstrip, t.rstrip),
        });
        let mut added: Vec<AddedToken> = added.collect();
        added.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.text.cmp(&b.text)));
        let mut this = Self {
            path,
            digest,
            inner,
            bos,
            eos,
            adds_bos: false,
            anchor: None,
            added,
            controls: Vec::new(),
            begins_anew: false,
            template: None,
        };
        let (with, without) = (this.raw("a", true)?, this.raw("a", false)?);
        this.adds_bos =
            bos.is_some_and(|id| with.first() == Some(&id) && with.len() > without.len());
        let first = without.first().and_then(|id| this.inner.id_to_token(*id));
        if first.is_some_and(|t| t.starts_with('\u{2581}')) {
            this.anchor = Some(this.raw(ANCHOR, false)?);
            this.begins_anew = this.probe(&without)?;
        }
        this.set_template(dir, None)?;
        Ok(this)
    }

    /// Whether "a" behind a special token has the ids that it has at the beginning of a text.
    fn probe(&mut self, alone: &[u32]) -> Result<bool> {
        let Some(special) = self.added.iter().find(|t| t.special) else { return Ok(false) };
        let text = format!("{}a", special.text);
        self.inner.set_encode_special_tokens(false);
        let ids = self.raw(&text, false);
        self.inner.set_encode_special_tokens(true);
        Ok(ids?.ends_with(alone))
    }

    /// Takes the chat template of a model folder, or another: a built-in one by name, or a file.
    pub fn set_template(&mut self, dir: &Path, named: Option<&str>) -> Result<()> {
        let mut template = ChatTemplate::open(dir, named, self.adds_bos)?;
        if let Some(template) = &mut template {
            template.name_token("bos_token", self.bos.and_then(|id| self.token(id)));
            template.name_token("eos_token", self.eos.first().and_then(|id| self.token(*id)));
        }
        let marks = |t: &&AddedToken| template.as_ref().is_some_and(|of| of.marks_with(&t.text));
        self.controls = self.added.iter().filter(|t| t.special || marks(t)).cloned().collect();
        self.template = template;
        Ok(())
    }

    /// The template of conversations.
    pub fn template(&self) -> Result<&ChatTemplate, String> {
        self.template.as_ref().ok_or_else(|| {
            let known: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
            format!(
                "the model has no chat template: set `chat_template` to one of {}, or to a file",
                known.join(", ")
            )
        })
    }

    /// Templates are told the time, not the same day always.
    pub fn tell_the_time(&mut self) {
        self.template.iter_mut().for_each(ChatTemplate::tell_the_time);
    }

    /// The control tokens of conversations in a text and the bytes that each takes, without those
    /// that `counts` refuses; of two at one place the longer one.
    pub fn controls_in(
        &self,
        text: &str,
        counts: impl Fn(&Range<usize>) -> bool,
    ) -> Vec<(Range<usize>, u32)> {
        let (mut all, mut free) = (Vec::new(), 0);
        for at in self.places(text) {
            if at < free {
                continue;
            }
            let spelled = |t: &&AddedToken| {
                text[at..].starts_with(&t.text) && counts(&(at..at + t.text.len()))
            };
            let Some(token) = self.controls.iter().find(spelled) else { continue };
            let (mut start, mut end) = (at, at + token.text.len());
            if token.strips.0 {
                start = free.max(text[..start].trim_end().len());
            }
            if token.strips.1 {
                end = text.len() - text[end..].trim_start().len();
            }
            all.push((start..end, token.id));
            free = end;
        }
        all
    }

    /// Where to cut a text so that it spells no mark of the template: the library reads those that
    /// it does not call special as tokens, wherever they stand.
    pub fn cuts_of_marks(&self, text: &str) -> Vec<usize> {
        let marks = || self.controls.iter().filter(|t| !t.special);
        if marks().next().is_none() {
            return Vec::new();
        }
        let spelled = |at: &usize| marks().any(|t| text[*at..].starts_with(&t.text));
        let behind_first = |at: usize| at + text[at..].chars().next().map_or(0, char::len_utf8);
        self.places(text).filter(spelled).map(behind_first).collect()
    }

    /// Where a control token may begin.
    fn places<'a>(&self, text: &'a str) -> impl Iterator<Item = usize> + 'a {
        let firsts: BTreeSet<char> =
            self.controls.iter().filter_map(|t| t.text.chars().next()).collect();
        text.match_indices(move |c| firsts.contains(&c)).map(|(at, _)| at)
    }

    /// The tokenizer of a model folder that may have none, with another chat template if one is
    /// named.
    pub fn open_if_there(dir: &Path, template: Option<&str>) -> Result<Option<Self>> {
        if !dir.join("tokenizer.json").exists() {
            return Ok(None);
        }
        let mut tokenizer = Self::open(dir)?;
        if let Some(name) = template {
            tokenizer.set_template(dir, Some(name))?;
        }
        Ok(Some(tokenizer))
    }

    /// A special token that a text spells, or that a message spells (`in_message`; there marks of
    /// the template count, too). It stays text, which may not be what was meant.
    pub fn special_in(&self, text: &str, in_message: bool) -> Option<&str> {
        let of = |t: &&AddedToken| t.special || in_message;
        let spelled =
            |at: usize| self.controls.iter().filter(of).find(|t| text[at..].starts_with(&t.text));
        self.places(text).find_map(spelled).map(|t| &*t.text)
    }

    /// The text of a token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    fn raw(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        match caught(|| self.inner.encode_fast(text, special)) {
            Some(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
            Some(Err(e)) => Err(Error::file(&self.path, format!("cannot encode a text: {e}"))),
            None => Err(Error::file(&self.path, "cannot encode a text: the tokenizer failed")),
        }
    }

    /// The ids of a text, without special tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.raw(text, false)
    }

    /// The ids of a text of which at most `room` are kept: all of them, or more than `room`, of
    /// which the kept ones are those of the whole text. No more of a long text is encoded than that
    /// takes, so that its memory is bounded by what is kept. (The end of a text without a space in
    /// thousands of characters may be split otherwise.)
    fn encode_part(&self, text: &str, room: usize, kept: Kept) -> Result<Vec<u32>> {
        let enough = room.saturating_add(SEAM);
        let mut bytes = enough.saturating_mul(BYTES_PER_TOKEN);
        while bytes < text.len() {
            let at = if kept == Kept::First { bytes } else { text.len() - bytes };
            let at = (at..).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
            // What comes before a space decides nothing after it; letters are split from the first
            // on.
            let space = text[at..].find(char::is_whitespace).filter(|_| kept == Kept::Last);
            let at = space.filter(|n| *n < bytes / 2).map_or(at, |n| at + n);
            let part = if kept == Kept::First { &text[..at] } else { &text[at..] };
            let mut ids = self.encode(part)?;
            if ids.len() > enough {
                match kept {
                    Kept::First => ids.truncate(room + 1),
                    Kept::Last => drop(ids.drain(..ids.len() - room - 1)),
                }
                return Ok(ids);
            }
            bytes = bytes.saturating_mul(4);
        }
        self.encode(text)
    }

    /// The ids of a whole text as the model expects its beginning: BOS first, once, if the model
    /// uses one.
    pub fn encode_start(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_start_within(text, usize::MAX, Kept::First)
    }

    /// [`Tokenizer::encode_start`] of which `room` ids are kept: all, or more than `room`.
    pub fn encode_start_within(&self, text: &str, room: usize, kept: Kept) -> Result<Vec<u32>> {
        let mut ids = self.encode_part(text, room, kept)?;
        if let Some(bos) = self.bos.filter(|_| self.adds_bos) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The ids of a text that continues another: prompt and completion are encoded apart, so that
    /// the boundary is exact and the prompt's ids are a prefix. Tokenizers that put a space before
    /// every text (Llama 2) do not put one here.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_continuation_within(text, usize::MAX)
    }

    /// [`Tokenizer::encode_continuation`] of which the first `room` ids are kept: all, or more than
    /// `room`.
    pub fn encode_continuation_within(&self, text: &str, room: usize) -> Result<Vec<u32>> {
        let whole = || self.encode_part(text, room, Kept::First);
        let Some(anchor) = &self.anchor else { return whole() };
        let (text, room) = (format!("{ANCHOR}{text}"), room.saturating_add(anchor.len()));
        let ids = self.encode_part(&text, room, Kept::First)?;
        match ids.strip_prefix(&anchor[..]) {
            Some(rest) => Ok(rest.to_vec()),
            // The anchor merged with the text: rather a space too many than a lost character.
            None => whole(),
        }
    }

    /// The ids of a text behind a special token.
    pub fn encode_after_control(&self, text: &str) -> Result<Vec<u32>> {
        if self.begins_anew { self.encode(text) } else { self.encode_continuation(text) }
    }

    /// Text of ids; special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.text(ids, true)
    }

    /// Text of ids, that of special tokens, too.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String> {
        self.text(ids, false)
    }

    fn text(&self, ids: &[u32], without_special: bool) -> Result<String> {
        match caught(|| self.inner.decode(ids, without_special)) {
            Some(Ok(text)) => Ok(text),
            Some(Err(e)) => Err(Error::file(&self.path, format!("cannot decode ids: {e}"))),
            None => Err(Error::file(&self.path, "cannot decode ids: the tokenizer failed")),
        }
    }

    /// Text of ids that continue others: what they add to the text of both, so that a space at the
    /// seam is kept.
    pub fn decode_continuation(&self, before: &[u32], ids: &[u32]) -> Result<String> {
        let (start, whole) = (self.decode(before)?, self.decode(&[before, ids].concat())?);
        // A character whose bytes lie on both sides belongs to neither text.
        match whole.strip_prefix(&start) {
            Some(rest) => Ok(rest.to_owned()),
            None => self.decode(ids),
        }
    }

    /// Beginning of a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Ids that end a sequence; the first is the one that training appends.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Whether a sequence begins with BOS.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// SHA-256 of `tokenizer.json`.
    pub fn digest(&self) -> String {
        self.digest.clone()
    }

    /// All that decides what ids a text or a conversation has.
    pub fn identity(&self) -> String {
        let Self { digest, bos, eos, template, .. } = self;
        format!("{digest} {bos:?} {eos:?} {:?}", template.as_ref().map(ChatTemplate::identity))
    }

    /// Checks that the tokenizer of another model's folder gives the same ids; that it has none is
    /// no error.
    pub fn agrees(&self, dir: &Path) -> Result<()> {
        if !dir.join("tokenizer.json").exists() {
            return Ok(());
        }
        let other = Self::open(dir)?;
        let (ours, theirs) = (self.inner.get_vocab(true), other.inner.get_vocab(true));
        let differs = ours.iter().filter(|(token, id)| theirs.get(*token) != Some(*id)).min();
        let Some((token, id)) = differs else { return Ok(()) };
        let got = theirs.get(token).map_or("no id".to_owned(), |id| format!("id {id}"));
        let ours = self.path.display();
        Err(Error::file(other.path, format!("has {got} for {token:?}, wanted {id} as in {ours}")))
    }

    /// Number of ids, special ones included.
    pub fn vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}
