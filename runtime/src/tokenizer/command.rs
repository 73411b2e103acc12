//! `pi-runtime tokenize`: shows how a model cuts a text.

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use super::{EncodeOptions, Tokenizer, TokenizerError};

/// Flags of `tokenize`.
#[derive(Debug, Clone, clap::Args)]
pub struct TokenizeArgs {
    /// Model file (GGUF) whose tokenizer to use; default: the demo model
    #[arg(short = 'm', long = "model", value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Text; default: all of stdin
    #[arg(
        short = 'p',
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "file"
    )]
    pub prompt: Option<String>,
    /// File with the text
    #[arg(short = 'f', long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Print the ids alone, as one list
    #[arg(long)]
    pub ids: bool,
    /// Print a JSON list of objects with id and text
    #[arg(long, conflicts_with = "ids")]
    pub json: bool,
    /// Add no begin- or end-of-text token, and take control tokens in the text for ordinary text
    #[arg(long)]
    pub no_special: bool,
}

/// Why `tokenize` failed.
#[derive(Debug, thiserror::Error)]
pub enum TokenizeError {
    /// The text cannot be encoded.
    #[error(transparent)]
    Text(#[from] TokenizerError),
    /// The output could not be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

#[derive(Serialize)]
struct TokenRow<'a> {
    id: u32,
    /// The token's text; bytes that are no UTF-8 show as U+FFFD.
    text: std::borrow::Cow<'a, str>,
    /// The bytes, where they are no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<&'a [u8]>,
}

/// Tokenises `text` and writes the tokens to `out`, in the form that `args` asks for.
///
/// The caller opens the model and reads the text.
///
/// # Errors
/// A text that cannot be encoded, or a failed write.
pub fn run(
    args: &TokenizeArgs,
    tokenizer: &Tokenizer,
    text: &str,
    out: &mut dyn Write,
) -> Result<(), TokenizeError> {
    let options = if args.no_special {
        EncodeOptions::TEXT
    } else {
        EncodeOptions::PROMPT
    };
    let ids = tokenizer.encode(text, options)?;
    if args.ids {
        write_ids(&ids, out)?;
    } else if args.json {
        write_json(tokenizer, &ids, out)?;
    } else {
        for &id in &ids {
            writeln!(out, "{id:6} -> {:?}", tokenizer.vocabulary().piece_text(id))?;
        }
    }
    out.flush()?;
    Ok(())
}

fn write_ids(ids: &[u32], out: &mut dyn Write) -> io::Result<()> {
    serde_json::to_writer(&mut *out, ids)?;
    writeln!(out)
}

fn write_json(tokenizer: &Tokenizer, ids: &[u32], out: &mut dyn Write) -> io::Result<()> {
    let vocabulary = tokenizer.vocabulary();
    let rows: Vec<TokenRow<'_>> = ids
        .iter()
        .map(|&id| {
            let bytes = vocabulary.piece(id);
            let no_utf8 = std::str::from_utf8(bytes).is_err();
            TokenRow {
                id,
                text: vocabulary.piece_text(id),
                bytes: no_utf8.then_some(bytes),
            }
        })
        .collect();
    serde_json::to_writer_pretty(&mut *out, &rows)?;
    writeln!(out)
}
