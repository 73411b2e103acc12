//! Functions that Hugging Face gives to chat templates.

use minijinja::{Environment, Error, ErrorKind};

use super::json;
use crate::calendar::DateTime;

/// Adds them, and the methods of Python's strings, lists and dictionaries.
pub fn add(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", json::to_json);
}

/// How a template refuses a conversation.
fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Today, for templates that tell the model the date.
fn strftime_now(format: String) -> String {
    DateTime::now().format(&format)
}
