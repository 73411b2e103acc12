//! What Ctrl-C leaves behind: nothing. In a binary of its own, as it concerns all unfinished files of a process.

use pi_runtime::unfinished_file::{UnfinishedFile, remove_all};

#[test]
fn all_unfinished_files_are_removed_and_none_follows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let (created, _file) = UnfinishedFile::create_beside(&path).unwrap();
    let named = UnfinishedFile::named_beside(&path, "Q8_0").unwrap();
    std::fs::write(named.path(), "x").unwrap();
    let unwritten = UnfinishedFile::named_beside(&path, "Q5_0").unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    let none_left = remove_all();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let late = std::thread::spawn({
        let path = path.clone();
        move || drop(UnfinishedFile::create_beside(&path))
    });
    // the thread waits, or has not come so far: either way there is no file
    std::thread::yield_now();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    drop(none_left);
    late.join().unwrap();
    drop((created, named, unwritten));
}
