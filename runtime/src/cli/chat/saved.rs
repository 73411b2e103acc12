//! Conversations in files: JSON with the messages, as the chat APIs have them.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::chat::Message;
use crate::error::RuntimeError;
use crate::unfinished_file::UnfinishedFile;

/// What is in the file.
#[derive(Serialize, Deserialize)]
struct Saved {
    messages: Vec<Message>,
}

/// Writes a conversation, atomically: until it is whole, `path` stays as it was.
///
/// # Errors
/// What the file system refuses.
pub fn save(messages: &[Message], path: &Path) -> Result<(), RuntimeError> {
    let saved = Saved {
        messages: messages.to_vec(),
    };
    let write = || {
        let mut json = serde_json::to_vec_pretty(&saved)?;
        json.push(b'\n');
        let (unfinished, mut file) = UnfinishedFile::create_beside(path)?;
        file.write_all(&json)?;
        unfinished.rename_to(path)
    };
    write().map_err(|source| RuntimeError::SaveConversation {
        path: path.to_path_buf(),
        source,
    })
}

/// Reads a conversation.
///
/// # Errors
/// The file cannot be read, or is no conversation.
pub fn load(path: &Path) -> Result<Vec<Message>, RuntimeError> {
    let text = std::fs::read(path).map_err(|source| RuntimeError::ReadText {
        path: path.to_path_buf(),
        source,
    })?;
    let saved: Saved =
        serde_json::from_slice(&text).map_err(|error| RuntimeError::BadConversation {
            path: path.to_path_buf(),
            problem: error.to_string(),
        })?;
    Ok(saved.messages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::Role;

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("talk.json");
        let messages = [
            Message::new(Role::System, "Be \"brief\"."),
            Message::new(Role::User, "a\nb"),
            Message::new(Role::Assistant, "é"),
        ];
        save(&messages, &path).unwrap();
        assert_eq!(load(&path).unwrap(), messages);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("talk.json");
        std::fs::write(
            &path,
            "{\"messages\": [{\"role\": \"me\", \"content\": \"\"}]}",
        )
        .unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert!(
            error.contains("talk.json") && error.contains("`me`"),
            "{error}"
        );
        let nowhere = folder.path().join("no/talk.json");
        assert!(save(&[], &nowhere).is_err() && load(&nowhere).is_err());
    }
}
