//! Dates and times of day, in UTC.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const WEEKDAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// A second in the Gregorian calendar, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DateTime {
    year: u64,
    /// From 1.
    month: u64,
    /// From 1.
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
    /// From 0, Sunday.
    weekday: u64,
    /// From 1.
    day_of_year: u64,
}

impl DateTime {
    /// The time now.
    pub fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self::from_unix(since.as_secs())
    }

    /// Seconds since 1970 as a date and time.
    pub fn from_unix(seconds: u64) -> Self {
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = date(days);
        Self {
            year,
            month,
            day,
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
            weekday: (days + 4) % 7,
            day_of_year: days - days_before(year) + 1,
        }
    }

    /// As `YYYY-MM-DDThh:mm:ssZ`.
    pub fn iso(&self) -> String {
        self.format("%Y-%m-%dT%H:%M:%SZ")
    }

    /// As C's `strftime` writes it in the C locale; `%-d` and the like leave out leading zeros. Directives that are not
    /// known stay as they are.
    pub fn format(&self, format: &str) -> String {
        let mut out = String::with_capacity(2 * format.len());
        let mut rest = format.chars();
        while let Some(c) = rest.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let before = rest.clone();
            let mut directive = rest.next();
            let unpadded = directive == Some('-');
            if unpadded {
                directive = rest.next();
            }
            if directive.is_none_or(|directive| !self.put(&mut out, directive, unpadded)) {
                out.push('%');
                rest = before;
            }
        }
        out
    }

    /// Appends what one directive stands for; whether it is known.
    fn put(&self, out: &mut String, directive: char, unpadded: bool) -> bool {
        let month = MONTHS[self.month as usize - 1];
        let weekday = WEEKDAYS[self.weekday as usize];
        let half_day = (self.hour + 11) % 12 + 1;
        let mut number = |value: u64, width: usize| {
            let width = if unpadded { 0 } else { width };
            // writing to a string cannot fail
            let _ = write!(out, "{value:0width$}");
        };
        match directive {
            'Y' => number(self.year, 4),
            'y' => number(self.year % 100, 2),
            'm' => number(self.month, 2),
            'd' => number(self.day, 2),
            'H' => number(self.hour, 2),
            'I' => number(half_day, 2),
            'M' => number(self.minute, 2),
            'S' => number(self.second, 2),
            'j' => number(self.day_of_year, 3),
            'e' if unpadded => number(self.day, 0),
            'e' => out.push_str(&format!("{:2}", self.day)),
            'B' => out.push_str(month),
            'b' | 'h' => out.push_str(&month[..3]),
            'A' => out.push_str(weekday),
            'a' => out.push_str(&weekday[..3]),
            'p' => out.push_str(if self.hour < 12 { "AM" } else { "PM" }),
            'F' => out.push_str(&self.format("%Y-%m-%d")),
            'T' => out.push_str(&self.format("%H:%M:%S")),
            'Z' => out.push_str("UTC"),
            'z' => out.push_str("+0000"),
            '%' => out.push('%'),
            _ => return false,
        }
        true
    }
}

/// Year, month and day of a number of days since 1970; years start in March, so that leap days come last.
fn date(days: u64) -> (u64, u64, u64) {
    let since_march_0 = days + 719_468;
    let (era, day_of_era) = (since_march_0 / 146_097, since_march_0 % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year_of_era + next_year, month, day)
}

/// Days from 1970 to the first day of `year`.
fn days_before(year: u64) -> u64 {
    let last = year - 1;
    let leap_days = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leap_days(last) - leap_days(1969)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_the_calendar_s() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(DateTime::from_unix(seconds).iso(), text);
        }
    }

    #[test]
    fn formats_as_strftime_does() {
        // Friday
        let time = DateTime::from_unix(1_735_900_207);
        for (format, text) in [
            ("%d %b %Y", "03 Jan 2025"),
            ("%A, %B %-d, %y", "Friday, January 3, 25"),
            ("%e|%a|%j|%-j", " 3|Fri|003|3"),
            ("%I:%M %p", "10:30 AM"),
            ("%F %T %Z%%", "2025-01-03 10:30:07 UTC%"),
            ("%Q %-", "%Q %-"),
        ] {
            assert_eq!(time.format(format), text, "{format}");
        }
        assert_eq!(DateTime::from_unix(951_782_400).format("%j %a"), "060 Tue");
        assert_eq!(DateTime::from_unix(978_220_800).format("%j"), "366");
    }
}
