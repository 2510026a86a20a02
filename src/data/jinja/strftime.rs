//! `strftime_now`: a date in words.

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
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

/// Year, month from 1 and day from 1 of a day since 1970-01-01, in the Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    // Years that begin in March end with the day that a leap year adds.
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + 400 * era + i64::from(month <= 2), month, date)
}

/// The seconds since 1970 of `2026-01-31`, at noon, if that is a day.
pub fn noon(date: &str) -> Option<i64> {
    let parts: Vec<i64> = date.split('-').map(|p| p.parse().ok()).collect::<Option<_>>()?;
    let [year, month, day] = parts[..] else { return None };
    if !(1970..=9999).contains(&year) || date.len() != 10 {
        return None;
    }
    let about = (year - 1970) * 365;
    (about..about + 2600).find(|d| civil(*d) == (year, month, day)).map(|d| d * 86_400 + 43_200)
}

/// A time in UTC as `format` says, in English.
pub fn strftime(now: i64, format: &str) -> Result<String, String> {
    let (days, second) = (now.div_euclid(86_400), now.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let weekday = (days + 4).rem_euclid(7) as usize;
    let month_name = MONTHS[(month - 1) as usize];
    let half = if hour % 12 == 0 { 12 } else { hour % 12 };
    let first = (days - 366..=days).find(|d| civil(*d).0 == year).unwrap_or(days);
    let mut out = String::new();
    let mut all = format.chars();
    while let Some(c) = all.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut kind = all.next();
        let bare = kind == Some('-');
        if bare {
            kind = all.next();
        }
        let two = |n: i64| if bare { n.to_string() } else { format!("{n:02}") };
        out += &match kind {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('H') => two(hour),
            Some('I') => two(half),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('j') => format!("{:03}", days - first + 1),
            Some('B') => month_name.into(),
            Some('b') => month_name[..3].into(),
            Some('A') => DAYS[weekday].into(),
            Some('a') => DAYS[weekday][..3].into(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".into(),
            Some('%') => "%".into(),
            Some(c) => return Err(format!("strftime_now has no `%{c}`")),
            None => return Err("strftime_now ends with a `%`".into()),
        };
    }
    Ok(out)
}
