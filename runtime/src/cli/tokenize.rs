//! `pi-runtime tokenize`.

use super::output::output_error;
use super::{demo_model, text_file};
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::tokenizer::{self, TokenizeArgs, TokenizeError, Tokenizer, VocabData};

/// Opens the model, reads the text and prints its tokens.
///
/// # Errors
/// The model, the text or the output.
pub fn run(args: &TokenizeArgs) -> Result<(), RuntimeError> {
    let file = GgufFile::open(demo_model::or_demo(args.model.as_deref())?)?;
    let tokenizer = Tokenizer::new(&VocabData::from_metadata(file.metadata())?)?;
    let text = match (&args.prompt, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => text_file::read(path)?,
        (None, None) => text_file::read_stdin()?,
    };
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    tokenizer::run(args, &tokenizer, &text, &mut out).map_err(|error| match error {
        TokenizeError::Text(error) => RuntimeError::Tokenizer(error),
        TokenizeError::Output(error) => output_error(error),
    })
}
