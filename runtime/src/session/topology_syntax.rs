//! What is wrong with a topology file, in its user's words: the line, the key, and what to write in its place.

use pi_topology::TopologyConfig;

/// Likeness from which on a name is meant: 1 for the same, 0 for nothing in common.
const LIKENESS_MIN: f64 = 0.75;
/// Letters from which on a name that is part of another is taken to mean it.
const PART_LEN_MIN: usize = 3;

/// Parses a topology; an error is a line, counted from 1, and what is wrong with which key there.
pub(super) fn parse(text: &str) -> Result<TopologyConfig, (usize, String)> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start).min(text.len());
        let line = 1 + text.as_bytes()[..start]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        (line, problem(text, line, error.message()))
    })
}

/// What is wrong on a line, from what the parser says of it.
fn problem(text: &str, line: usize, message: &str) -> String {
    let content = text.lines().nth(line - 1).unwrap_or_default().trim();
    if let Some(problem) = wrong_header(content) {
        return problem;
    }
    let message = in_our_words(message);
    if let Some((unknown, expected)) = unknown_key(&message) {
        return match suggestion(unknown, &expected) {
            Some(hint) => format!("{message}; {hint}"),
            None => message,
        };
    }
    match key_on(content) {
        Some(key) if !message.contains(&format!("`{key}`")) => format!("{key}: {message}"),
        _ => message,
    }
}

/// The parser's message without the words that are the program's own.
fn in_our_words(message: &str) -> String {
    let message = message.trim().replace('\n', ", ");
    let words = [
        ("unknown field", "unknown key"),
        (" as i128", ""),
        (" as u128", ""),
        ("expected a boolean", "expected true or false"),
        ("invalid type: map,", "invalid type: table,"),
        ("invalid type: sequence,", "invalid type: list,"),
        ("expected a sequence", "expected a list of tables"),
    ];
    words
        .iter()
        .fold(message, |message, (from, to)| message.replace(from, to))
}

/// The unknown key of a message, and those that there could be in its place.
///
/// serde names them: "unknown field `a`, expected one of `b`, `c`".
fn unknown_key(message: &str) -> Option<(&str, Vec<&str>)> {
    let names = message.strip_prefix("unknown key `")?;
    let mut names = names.split('`').step_by(2);
    Some((names.next()?, names.collect()))
}

/// What to do about an unknown key: take the one that it is a part of, move it to the table that has it, or take one that is
/// like it; those that are `expected` where it stands come first.
fn suggestion(unknown: &str, expected: &[&str]) -> Option<String> {
    let keys = TopologyConfig::keys();
    let here = |key: &str| format!("did you mean `{key}`?");
    let there = |(table, key): &(&str, &str)| format!("did you mean `{key}` of {}?", named(table));
    let is_part = |key: &str| unknown.len() >= PART_LEN_MIN && key.contains(unknown);
    let part = expected.iter().find(|key| is_part(key));
    if let Some(key) = part {
        return Some(here(key));
    }
    if let Some((table, _)) = keys.iter().find(|(_, key)| *key == unknown) {
        return Some(format!("it belongs in {}", named(table)));
    }
    if let Some(key) = most_alike(unknown, expected.iter().copied()) {
        return Some(here(key));
    }
    let alike = most_alike(unknown, keys.iter().map(|(_, key)| *key));
    let elsewhere = keys
        .iter()
        .find(|(_, key)| is_part(key) || Some(*key) == alike);
    elsewhere.map(there)
}

/// The name that is most like `unknown`, if one is like it at all.
fn most_alike<'a>(unknown: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let alike = |name: &str| strsim::jaro_winkler(unknown, name);
    let best = names.max_by(|a, b| alike(a).total_cmp(&alike(b)))?;
    (alike(best) > LIKENESS_MIN).then_some(best)
}

/// A table as a sentence has it.
fn named(table: &str) -> &str {
    match table {
        "" => "no table, at the top of the file",
        table => table,
    }
}

/// What is wrong with a table's line, if it is one: its name, or how many brackets it has.
fn wrong_header(line: &str) -> Option<String> {
    if !line.starts_with('[') {
        return None;
    }
    let name = key_on(line)?;
    let mut tables: Vec<&str> = TopologyConfig::keys()
        .iter()
        .map(|(table, _)| *table)
        .collect();
    tables.dedup();
    tables.retain(|table| !table.is_empty());
    let bare = |table: &str| table.trim_matches(['[', ']']).to_owned();
    if let Some(table) = tables.iter().find(|table| bare(table) == name) {
        let is_list = table.starts_with("[[");
        return (is_list != line.starts_with("[[")).then(|| match is_list {
            true => format!("[{name}]: there can be several: write {table}, once for each"),
            false => format!("[[{name}]]: there is one: write {table}"),
        });
    }
    let alike = |table: &str| strsim::jaro_winkler(name, &bare(table));
    let best = tables.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)))?;
    let hint = match alike(best) > LIKENESS_MIN {
        true => format!("did you mean {best}?"),
        false => format!("expected one of {}", tables.join(", ")),
    };
    Some(format!("unknown table `{name}`; {hint}"))
}

/// The key or table that a line of TOML is about.
fn key_on(line: &str) -> Option<&str> {
    let line = line.trim();
    let key = if line.starts_with('[') {
        line.split(['#', ']'])
            .next()?
            .trim_start_matches('[')
            .trim()
    } else {
        line.split_once('=')?.0.trim()
    };
    (!key.is_empty()).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> (usize, String) {
        parse(text).unwrap_err()
    }

    #[test]
    fn errors_carry_line_and_key() {
        let (line, text) = problem("name = \"x\"\n\n[host]\nthreads = \"many\"\n");
        assert_eq!(line, 4);
        assert!(text.contains("threads") && text.contains("many"), "{text}");
        let (line, text) = problem("[host]\nthreads = 0\n");
        assert!(line == 2 && text.contains("threads"), "{line} {text}");
        let (line, text) = problem("name = \n");
        assert!(line == 1 && text.starts_with("name"), "{line} {text}");
    }

    #[test]
    fn unknown_keys_are_led_to_known_ones() {
        for (text, at, hint) in [
            (
                "[memory]\nhuge_page = \"try\"\n",
                2,
                "did you mean `huge_pages`?",
            ),
            ("[memory]\n\nstrictly = true\n", 3, "did you mean `strict`?"),
            (
                "[[gpu]]\nvram = \"1GiB\"\n",
                2,
                "did you mean `vram_budget`?",
            ),
            (
                "[[gpu]]\nbudget = \"1GiB\"\n",
                2,
                "did you mean `vram_budget`?",
            ),
            ("[machine]\nnodes = 2\n", 2, "did you mean `numa_nodes`?"),
            ("strict = true\n", 1, "it belongs in [memory]"),
            (
                "[host]\nhuge_pages = \"try\"\n",
                2,
                "it belongs in [memory]",
            ),
            (
                "[memory]\nvram_budget = \"all\"\n",
                2,
                "it belongs in [[gpu]]",
            ),
            (
                "[memory]\nname = \"x\"\n",
                2,
                "it belongs in no table, at the top of the file",
            ),
            (
                "hugepages = \"try\"\n",
                1,
                "did you mean `huge_pages` of [memory]?",
            ),
        ] {
            let (line, problem) = problem(text);
            assert_eq!(line, at, "{text}{problem}");
            assert!(problem.starts_with("unknown key `"), "{text}{problem}");
            assert!(problem.ends_with(&format!("; {hint}")), "{text}{problem}");
        }
        let (_, text) = problem("[host]\nxyz = 1\n");
        assert!(
            text.starts_with("unknown key `xyz`, expected one of `nodes`"),
            "{text}"
        );
        assert!(!text.contains(';'), "{text}");
    }

    #[test]
    fn tables_are_written_as_they_must_be() {
        for (text, expected) in [
            (
                "[gpu]\n",
                "[gpu]: there can be several: write [[gpu]], once for each",
            ),
            (
                "[host.node]\ncpus = [0]\n",
                "[host.node]: there can be several: write [[host.node]], once for each",
            ),
            ("[[memory]]\n", "[[memory]]: there is one: write [memory]"),
            (
                "[[host.nodes]]\ncpus = [0]\n",
                "unknown table `host.nodes`; did you mean [[host.node]]?",
            ),
            ("[gpus]\n", "unknown table `gpus`; did you mean [[gpu]]?"),
            (
                "[x]\n",
                "unknown table `x`; expected one of [machine], [memory], [sparsity], [host], [[host.node]], [[gpu]]",
            ),
        ] {
            assert_eq!(problem(text), (1, expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn values_are_refused_in_words_of_a_topology() {
        for (text, expected) in [
            (
                "[memory]\nstrict = 1\n",
                "strict: invalid type: integer `1`, expected true or false",
            ),
            (
                "[memory]\nhuge_pages = true\n",
                "huge_pages: invalid type: boolean `true`, expected \"try\", \"require\" or \"off\"",
            ),
            (
                "[host]\nreserved_cores = -1\n",
                "reserved_cores: invalid value: integer `-1`, expected a whole number from 0",
            ),
            (
                "[host]\nthreads = 12345678901234567890123\n",
                "threads: invalid type: integer `12345678901234567890123`, expected \"cores\", \"hyperthreads\" or a number of \
                 threads from 1",
            ),
            (
                "[host]\nnode = 3\n",
                "node: invalid type: integer `3`, expected a list of tables",
            ),
        ] {
            assert_eq!(problem(text), (2, expected.to_owned()), "{text}");
        }
        let (line, text) = problem("[memory]\n[[host.node]]\nnuma = 0\n");
        assert_eq!(line, 2);
        assert!(
            text.contains("host.node 0 lists no CPU: name at least one in cpus"),
            "{text}"
        );
    }
}
